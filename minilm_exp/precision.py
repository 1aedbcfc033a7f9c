"""The data type of the matrix products, and of the teacher's states."""

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


def teacher_dtype(precision: str, teacher_cache: str) -> torch.dtype:
    """What the teacher's states are rounded to before the relations.

    In bf16 they are bfloat16 whether they come from a cache, which holds bfloat16, or not; so the
    cache changes nothing. In fp32 it does, and is used only where runtime.teacher_cache=true.
    """
    is_bf16 = precision == "bf16" or teacher_cache == "true"
    return torch.bfloat16 if is_bf16 else torch.float32
