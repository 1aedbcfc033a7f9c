"""The data type of the matrix products."""

from __future__ import annotations

import torch


def resolve_precision(asked: str, device: str) -> str:
    """fp32 or bf16. `auto` asks the processor what it can do, never how fast it is."""
    if asked != "auto":
        return asked
    if device.startswith("cuda"):
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"
