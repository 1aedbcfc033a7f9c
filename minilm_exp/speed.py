"""How much faster a model is than another, measured side by side."""

from __future__ import annotations

import statistics
import time

import numpy
import torch
from torch import Tensor
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


@torch.inference_mode()
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
    models = [one.eval().to(device) for one in (baseline, model)]
    draw = numpy.random.default_rng(0)
    longest = min(
        max_tokens(one.config.model_type, one.config.max_position_embeddings) for one in models
    )
    vocab_size = min(one.config.vocab_size for one in models)
    ratios = []
    for round_number in range(_WARMUP_ROUNDS + num_batches):
        batch = draw_batch(draw, batch_size, vocab_size, longest, device)
        seconds = [seconds_of(one, batch) for one in models]
        if round_number >= _WARMUP_ROUNDS:
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


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


def seconds_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """Wall-clock time of a forward pass."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
