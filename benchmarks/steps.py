"""Models of a size, and the training steps that are compared on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from benchmarks.naive import NaiveDistiller, relation_loss
from minilm_exp.distil import Distiller
from minilm_exp.objectives import Objective
from minilm_exp.relations import Pair
from minilm_exp.relations import relation_loss as block_loss
from minilm_exp.states import StateTap, qkv_states
from minilm_exp.student import untrained_parameters
from minilm_exp.teacher_cache import Plan, TeacherCaches
from minilm_exp.terms import Relations

PAIRS: list[Pair] = [("query", "query"), ("key", "key"), ("value", "value")]
VARIANTS = ("floor", "naive", "ours")

Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Size:
    """Shapes of a step: layers, hidden size and attention heads of both models, batch."""

    teacher: tuple[int, int, int]
    student: tuple[int, int, int]
    num_relation_heads: int
    num_sequences: int
    num_tokens: int

    def __str__(self) -> str:
        teacher, student = (f"{model[0]}x{model[1]}" for model in (self.teacher, self.student))
        return f"{self.num_sequences}x{self.num_tokens}, {teacher} -> {student}"


SHORT = Size((12, 256, 8), (3, 128, 8), 16, 16, 128)
LONG = Size((12, 256, 8), (3, 128, 8), 16, 4, 512)
BASE = Size((12, 768, 12), (6, 384, 12), 48, 8, 128)
LARGE_ON_GPU = Size((24, 1024, 16), (6, 768, 12), 64, 32, 512)


def build(layers: int, hidden_size: int, num_heads: int, dropout: float = 0.1) -> BertModel:
    """A BERT encoder with random weights, whose relations are far from uniform.

    Scores are as large as in all-MiniLM-L6-v2, up to about 30.
    """
    torch.manual_seed(layers * hidden_size)
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.1 * (256 / hidden_size) ** 0.5,
    )
    return BertModel(config, add_pooling_layer=False)


def batch(size: Size, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and an attention mask without padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.num_sequences, size.num_tokens)
    ids = torch.randint(1000, 30000, shape, generator=generator)
    return ids.to(device), torch.ones_like(ids).to(device)


def make_step(
    variant: str, size: Size, device: str = "cpu", autocast: bool = False, dropout: float = 0.1
) -> Step:
    """A training step: naive, ours, or the floor, which runs both models whole without the loss."""
    teacher = build(*size.teacher).eval().requires_grad_(False).to(torch.device(device))
    student = build(*size.student, dropout).train().to(torch.device(device))
    if variant == "naive":
        step: Step = NaiveDistiller(teacher, student, size.teacher[0], size.num_relation_heads).step
    elif variant == "floor":
        step = _floor(teacher, student)
    else:
        step = _ours(Distiller(teacher, student, _objective(size)))

    def run(input_ids: Tensor, attention_mask: Tensor) -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            step(input_ids, attention_mask)

    return run


def _floor(teacher: BertModel, student: BertModel) -> Step:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def step(input_ids: Tensor, attention_mask: Tensor) -> None:
        with torch.no_grad():
            teacher(input_ids=input_ids, attention_mask=attention_mask)
        hidden = student(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _objective(size: Size) -> Objective:
    layers = [(size.teacher[0], size.student[0])]
    relations = Relations(layers, PAIRS, size.num_relation_heads)
    return Objective({"relations": relations}, {"relations": 1.0})


def _ours(distiller: Distiller) -> Step:
    untrained = set(untrained_parameters(distiller.student))
    trained = [
        p for name, p in distiller.student.encoder.named_parameters() if name not in untrained
    ]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(input_ids: Tensor, attention_mask: Tensor) -> None:
        # A packed block has no padding, so the corpus gives no mask.
        mask = None if attention_mask.all() else attention_mask
        distiller(input_ids=input_ids, attention_mask=mask)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_cached_step(size: Size, cached: bool, precision: str) -> tuple[Step, TemporaryDirectory]:
    """Our step in bf16, reading the teacher's states from a filled cache or running the teacher."""
    teacher = build(*size.teacher).eval().requires_grad_(False)
    student = build(*size.student).train()
    folder = TemporaryDirectory()
    lengths = numpy.full(size.num_sequences, size.num_tokens)
    num_bytes = int(lengths.sum()) * 3 * size.teacher[1] * 2
    caches = (
        TeacherCaches(
            Path(folder.name),
            "bench",
            {"train": lengths, "validation": lengths},
            size.teacher[1],
            Plan(True, "", num_bytes),
            1e12,
        )
        if cached
        else None
    )
    distiller = Distiller(
        teacher,
        student,
        _objective(size),
        teacher_dtype=torch.bfloat16 if precision == "bf16" or cached else torch.float32,
        caches=caches,
    )
    index = torch.arange(size.num_sequences)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def step(input_ids: Tensor, attention_mask: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = distiller(input_ids=input_ids, index=index)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, folder


def make_loss(variant: str, size: Size) -> Callable[[], None]:
    """Value and gradient of the loss alone."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.num_sequences, size.num_tokens)
    teacher, student = (
        {
            name: torch.randn(*shape, hidden_size, generator=generator)
            for name in ("query", "key", "value")
        }
        for hidden_size in (size.teacher[1], size.student[1])
    )
    for state in student.values():
        state.requires_grad_()
    mask = torch.ones(shape, dtype=torch.long)

    def run() -> None:
        if variant == "naive":
            loss = relation_loss(teacher, student, size.num_relation_heads, mask)
        else:
            loss = block_loss(teacher, student, PAIRS, size.num_relation_heads, mask)
        loss.backward()
        for state in student.values():
            state.grad = None

    return run


def cut_and_whole(size: Size) -> dict[str, Callable[[], None]]:
    """Forward of the teacher and forward and backward of the student, whole and cut."""
    input_ids, _ = batch(size)
    whole = {"teacher": build(*size.teacher).eval(), "student": build(*size.student)}
    cut = {
        name: StateTap(copy.deepcopy(model), qkv_states(model.config.num_hidden_layers))
        for name, model in whole.items()
    }

    def forward(model: Callable) -> None:
        with torch.no_grad():
            model(input_ids=input_ids)

    def learn(sum_of_outputs: Callable[[], Tensor]) -> None:
        sum_of_outputs().backward()

    return {
        "teacher whole": lambda: forward(whole["teacher"]),
        "teacher cut": lambda: forward(cut["teacher"]),
        "student whole": lambda: learn(
            lambda: whole["student"](input_ids=input_ids).last_hidden_state.sum()
        ),
        "student cut": lambda: learn(
            lambda: torch.stack(
                [s.sum() for s in cut["student"](input_ids=input_ids).values()]
            ).sum()
        ),
    }
