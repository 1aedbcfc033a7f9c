"""How much faster a model is than another, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm_exp.settings import max_tokens

_WARMUP_ROUNDS = 2
# Tokens of QNLI's pairs with BERT's uncased vocabulary, cut off at 128: each twentieth of 4,000 of
# them, from the shortest to the longest.
QNLI_LENGTHS = (
    15,
    27,
    31,
    33,
    36,
    38,
    40,
    42,
    44,
    46,
    48,
    50,
    52,
    54,
    57,
    60,
    63,
    67,
    75,
    86,
    128,
)


def measure_speedup(
    baseline: PreTrainedModel,
    model: PreTrainedModel,
    num_batches: int,
    batch_size: int,
    device: str,
) -> float:
    """Median over batches of the baseline's forward time divided by the model's.

    MiniLM (section 4.1) times 100 batches of QNLI. Here the batches have QNLI's lengths, cut off
    where a model has too few positions, and any tokens, and both models read each batch in turn, so
    that a change in the machine's speed touches both; whole encoders, float32.
    """
    models = {"baseline": baseline.eval().to(device), "model": model.eval().to(device)}
    seconds = measure_seconds(models, num_batches, batch_size, device)
    return speedup(seconds["baseline"], seconds["model"])


@torch.inference_mode()
def measure_seconds(
    models: Mapping[str, nn.Module], num_batches: int, batch_size: int, device: str
) -> dict[str, list[float]]:
    """Forward time of each batch, of models that read each in turn, see `measure_speedup`."""
    draw = numpy.random.default_rng(0)
    configs: list[Any] = [one.config for one in models.values()]
    longest = min(max_tokens(one.model_type, one.max_position_embeddings) for one in configs)
    vocab_size = min(one.vocab_size for one in configs)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(_WARMUP_ROUNDS + num_batches):
        batch = draw_batch(draw, batch_size, vocab_size, longest, device)
        for name, one in models.items():
            taken = seconds_of(one, batch)
            if round_number >= _WARMUP_ROUNDS:
                seconds[name].append(taken)
    return seconds


def speedup(baseline_seconds: list[float], seconds: list[float]) -> float:
    """Median over batches of the baseline's forward time divided by a model's."""
    return statistics.median(one / other for one, other in zip(baseline_seconds, seconds))


def draw_batch(
    draw: numpy.random.Generator,
    batch_size: int,
    vocab_size: int,
    longest: int,
    device: str,
    length: int | None = None,
) -> dict[str, Tensor]:
    """Any tokens, of so many each, or of QNLI's lengths cut off at `longest`."""
    if length is None:
        twentieths = numpy.arange(len(QNLI_LENGTHS))
        places = draw.uniform(0, twentieths[-1], batch_size)
        sizes = numpy.interp(places, twentieths, QNLI_LENGTHS).astype("int64")
    else:
        sizes = numpy.full(batch_size, length)
    lengths = torch.from_numpy(sizes.clip(max=longest))
    longest = int(lengths.max())
    ids = torch.from_numpy(draw.integers(vocab_size // 2, vocab_size, (batch_size, longest)))
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def seconds_of(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Wall-clock time of a forward pass."""
    if batch["input_ids"].device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**batch)
    if batch["input_ids"].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
