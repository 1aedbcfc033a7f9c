"""How long a run will about take, before it begins."""

from __future__ import annotations

import functools
import time

import torch

from minilm_exp.settings import Settings

# Tokens of an average example of a task, and training examples where the settings name no limit.
_TASK_TOKENS = 64
_TASK_EXAMPLES = 50_000
# The share of a large matrix product's speed that training reaches, measured on two CPU cores.
_EFFICIENCY = 0.5


def estimate_seconds(settings: Settings) -> float:
    """From the matrix products alone: within a factor of two or three, without any cache.

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
    return operations / (_EFFICIENCY * _operations_per_second(settings.runtime.device))


def _weights(num_layers: int, hidden_size: int, intermediate_size: int | None) -> int:
    wide = intermediate_size or 4 * hidden_size
    return num_layers * (4 * hidden_size**2 + 2 * hidden_size * wide)


@functools.cache
def _operations_per_second(device: str) -> float:
    first, second = (torch.ones(1024, 1024, device=device) for _ in range(2))
    count = 0
    start = time.monotonic()
    while time.monotonic() - start < 0.3:
        float((first @ second)[0, 0])
        count += 1
    return count * 2 * 1024**3 / (time.monotonic() - start)
