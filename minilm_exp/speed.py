"""How much faster the student is, measured beside the teacher."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

_WARMUP_ROUNDS = 2


@torch.inference_mode()
def measure_speedup(
    teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor, num_rounds: int = 10
) -> float:
    """Median over rounds of the teacher's forward time divided by the student's.

    Both whole encoders read the same batch in turn, so that a change in the machine's speed
    touches both; float32.
    """
    models = [model.eval().to(input_ids.device) for model in (teacher, student)]
    ratios = []
    for round_number in range(_WARMUP_ROUNDS + num_rounds):
        seconds = [_time(model, input_ids) for model in models]
        if round_number >= _WARMUP_ROUNDS:
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _time(model: PreTrainedModel, input_ids: Tensor) -> float:
    if input_ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=input_ids)
    if input_ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
