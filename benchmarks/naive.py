"""Relation distillation as an able engineer writes it first.

Both models run whole; hooks on the projections catch queries, keys and values; the loss is
vectorised over the batch and holds every relation; examples are padded to the longest of a batch.
The yardstick of every ratio in this folder.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

STATES = ("query", "key", "value")


class Hooks:
    """Keeps what the query, key and value projections of one BERT layer put out."""

    def __init__(self, model: BertModel, layer: int) -> None:
        self.states: dict[str, Tensor] = {}
        attention = model.encoder.layer[layer - 1].attention.self
        for name in STATES:
            getattr(attention, name).register_forward_hook(self._keep(name))

    def _keep(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            self.states[name] = output

        return hook


def relation_loss(
    teacher: dict[str, Tensor],
    student: dict[str, Tensor],
    num_relation_heads: int,
    attention_mask: Tensor,
) -> Tensor:
    """Sum of the Q-Q, K-K and V-V losses, with every relation in memory."""
    total = torch.zeros((), device=attention_mask.device)
    key_bias = torch.finfo(torch.float32).min * (attention_mask == 0)[:, None, None, :]
    num_tokens = attention_mask.sum(dim=1)
    for name in STATES:
        log_relations = []
        for states in (teacher, student):
            heads = states[name].unflatten(-1, (num_relation_heads, -1)).transpose(1, 2)
            scores = heads / heads.shape[-1] ** 0.5 @ heads.transpose(-1, -2)
            scores += key_bias
            log_relations.append(functional.log_softmax(scores, dim=-1))
        divergence = functional.kl_div(
            log_relations[1], log_relations[0], reduction="none", log_target=True
        )
        rows = divergence.sum(dim=-1).mean(dim=1) * attention_mask
        total = total + (rows.sum(dim=1) / num_tokens).mean()
    return total


class NaiveDistiller:
    """One training step after the other."""

    def __init__(
        self, teacher: BertModel, student: BertModel, teacher_layer: int, num_relation_heads: int
    ) -> None:
        self.teacher, self.student = teacher.eval(), student.train()
        self.num_relation_heads = num_relation_heads
        self.teacher_hooks = Hooks(teacher, teacher_layer)
        self.student_hooks = Hooks(student, student.config.num_hidden_layers)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def step(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Forward, backward and update."""
        with torch.no_grad():
            self.teacher(input_ids=input_ids, attention_mask=attention_mask)
        self.student(input_ids=input_ids, attention_mask=attention_mask)
        loss = relation_loss(
            self.teacher_hooks.states,
            self.student_hooks.states,
            self.num_relation_heads,
            attention_mask,
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def padded_batches(
    examples: list[list[int]], batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Examples in random order, padded to the longest of each batch: ids and attention mask."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = [examples[index] for index in order[start : start + batch_size]]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        yield input_ids, (torch.arange(longest) < lengths[:, None]).long()
