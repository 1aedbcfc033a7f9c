"""How long a run will about take, before it begins."""

from __future__ import annotations

import functools
import time

import torch
from torch import nn

from minilm_exp.precision import resolve_precision
from minilm_exp.settings import Settings

# Tokens of an average example of a task, and training examples where the settings name no limit.
_TASK_TOKENS = 64
_TASK_EXAMPLES = 50_000
# The share of a feed-forward layer's speed that training reaches, measured on two CPU cores.
_EFFICIENCY = 0.5


def estimate_seconds(settings: Settings) -> float:
    """From the matrix products alone: within a factor of two, without any cache.

    A token costs two operations for each weight of the blocks forward, and four backward.
    """
    operations = 0.0
    teacher = settings.teacher
    for stage in settings.corpus_stages:
        given = stage.settings
        tokens = given.training.max_steps * given.training.batch_size * given.corpus.block_length
        student = given.student
        weights = _weights(student.num_layers, student.hidden_size, student.intermediate_size)
        read = given.layer_selection.teacher_layer / teacher.num_layers
        teacher_weights = _weights(
            teacher.num_layers, teacher.hidden_size, teacher.intermediate_size
        )
        operations += tokens * (6 * weights + 2 * read * teacher_weights)
    student = settings.chain[-1].settings.student
    sizes = {
        "student": (student.num_layers, student.hidden_size, student.intermediate_size),
        "teacher": (teacher.num_layers, teacher.hidden_size, teacher.intermediate_size),
    }
    sizes["undistilled"] = sizes["student"]
    for name, task in settings.tasks.items():
        for cell in settings.task_training.cells(name, task):
            if not task.is_trained:
                continue
            examples = (cell.max_train_examples or _TASK_EXAMPLES) * cell.epochs
            for role in settings.recipe.models:
                operations += (
                    examples * _TASK_TOKENS * 6 * _weights(*sizes[role])
                ) * settings.task_training.num_seeds
    device = settings.runtime.device
    precision = resolve_precision(settings.training.precision, device)
    return operations / (_EFFICIENCY * _operations_per_second(device, precision == "bf16"))


def _weights(num_layers: int, hidden_size: int, intermediate_size: int | None) -> int:
    wide = intermediate_size or 4 * hidden_size
    return num_layers * (4 * hidden_size**2 + 2 * hidden_size * wide)


@functools.cache
def _operations_per_second(device: str, is_bf16: bool) -> float:
    """Of a feed-forward layer of 384 units, forward and backward, on 4,096 tokens."""
    layer = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384)).to(device)
    tokens = torch.ones(4096, 384, device=device, requires_grad=True)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, is_bf16):
            output = layer(tokens)
        gradients = torch.autograd.grad(output.sum(), [tokens, *layer.parameters()])
        float(gradients[0][0, 0])

    step()  # which makes what the others reuse
    count = 0
    start = time.monotonic()
    while time.monotonic() - start < 0.5:
        step()
        count += 1
    return count * 6 * len(tokens) * 2 * 384 * 1536 / (time.monotonic() - start)
