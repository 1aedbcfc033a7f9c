"""The terms of an objective that compare states of teacher and student.

Every term is a mean over what one sequence has of it (real tokens, heads, entries of a vector),
then the mean over the sequences of a batch, as in `relations`; what differs is said at the term.
Padding on either side, in any amount and with any content, changes neither value nor gradient.
Arithmetic is in float32 whatever the autocast data type, in float64 for float64 states. Where there
are several pairs of layers their losses are summed. Divergences are always teacher || student, in
nats.

Shape suffixes in this file:
    B sequences   S tokens per sequence, padded   D size of a state   A attention heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from minilm_exp.errors import ExperimentError
from minilm_exp.relations import Pair, relation_losses
from minilm_exp.sentence_modules import Pooling
from minilm_exp.states import State

States = Mapping[State, Tensor]


class Term(nn.Module):
    """One loss.

    Attributes:
        teacher_states: What it needs of the teacher.
        student_states: What it needs of the student.
        part_names: Names of what its loss is the sum of, or [""].
        reads_labels: Whether it needs the labels of the data.
    """

    teacher_states: list[State]
    student_states: list[State]
    part_names: list[str]
    reads_labels: bool = False

    def forward(
        self,
        teacher: States,
        student: States,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and its parts without a gradient."""
        raise NotImplementedError


class Relations(Term):
    """Self-attention relations of one or several pairs of layers; see `relation_loss`.

    With the pairs qk and vv, the last layers and as many relation heads as attention heads it is
    MiniLM's loss (arXiv:2002.10957, eq. 6 to 10): qk is then the attention distribution.

    Args:
        layers: Pairs of a teacher's and a student's layer.
        pairs: Relations, as pairs of state names.
        num_relation_heads: Number of parts of each state.
        kernel: How it is computed, see `relation_loss`.
    """

    def __init__(
        self,
        layers: list[tuple[int, int]],
        pairs: list[Pair],
        num_relation_heads: int,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.layers, self.pairs = layers, pairs
        self.num_relation_heads, self.kernel = num_relation_heads, kernel
        self._names = sorted({name for pair in pairs for name in pair})
        self.teacher_states = [State(name, layer) for layer, _ in layers for name in self._names]
        self.student_states = [State(name, layer) for _, layer in layers for name in self._names]
        self.part_names = [f"{first}-{second}" for first, second in pairs]

    def forward(
        self,
        teacher: States,
        student: States,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum over layers and pairs; the parts are the pairs, summed over layers."""
        losses = [
            relation_losses(
                {name: teacher[State(name, teacher_layer)] for name in self._names},
                {name: student[State(name, student_layer)] for name in self._names},
                self.pairs,
                self.num_relation_heads,
                attention_mask,
                self.kernel,
            )
            for teacher_layer, student_layer in self.layers
        ]
        return sum_of(total for total, _ in losses), sum_of(parts_P for _, parts_P in losses)


class AttentionScores(Term):
    """Mean squared difference of attention scores before the softmax (TinyBERT, arXiv:1909.10351).

    Source: eq. 7 of the paper and general_distill.py. Scores are the scaled dot products of queries
    and keys as the attention uses them, without what some architectures add by position. The mean
    is over heads and over the pairs of a real query and a real key; TinyBERT's code takes it over
    all entries, padding (as 0) included.

    Args:
        layers: Pairs of a teacher's and a student's layer.
        num_heads: Attention heads of both models.
    """

    def __init__(self, layers: list[tuple[int, int]], num_heads: int) -> None:
        super().__init__()
        self.layers, self.num_heads = layers, num_heads
        self.teacher_states = [State(name, layer) for layer, _ in layers for name in _SCORED]
        self.student_states = [State(name, layer) for _, layer in layers for name in _SCORED]
        self.part_names = [""]

    def forward(
        self,
        teacher: States,
        student: States,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum over layers."""
        total = sum_of(
            self._loss(
                [teacher[State(name, teacher_layer)] for name in _SCORED],
                [student[State(name, student_layer)] for name in _SCORED],
                attention_mask,
            )
            for teacher_layer, student_layer in self.layers
        )
        return total, total.detach()[None]

    def _loss(
        self, teacher: list[Tensor], student: list[Tensor], attention_mask: Tensor | None
    ) -> Tensor:
        is_real_BS = is_real(attention_mask, student[0])
        teacher_BASS, student_BASS = (
            self._scores([_without_padding(state, is_real_BS) for state in states])
            for states in (teacher, student)
        )
        both_B1SS = (is_real_BS[:, :, None] & is_real_BS[:, None, :])[:, None]
        squares_BASS = (student_BASS - teacher_BASS).square().masked_fill(~both_B1SS, 0)
        num_real_B = is_real_BS.sum(dim=1)
        return (squares_BASS.sum(dim=(1, 2, 3)) / (self.num_heads * num_real_B**2)).mean()

    def _scores(self, states: list[Tensor]) -> Tensor:
        query, key = (
            exact(state).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for state in states
        )
        return query @ key.transpose(2, 3) / query.shape[-1] ** 0.5


_SCORED = ("query", "key")


class StateDistance(Term):
    """Distance of states, or of what is made of them, between teacher and student.

    mse and l1 are means over the entries of a vector: Patient-KD's own code does the same, while
    TextBrewer sums over the entries, so that its weight is smaller by the size of the vector.
    cosine is 1 - cos. kl is that of the softmax over the entries, summed over them. A mean over
    tokens and `first_token` see real tokens only.

    Args:
        pairs: States of teacher and student.
        sizes: Of each pair, the two sizes.
        transforms: Done to both sides in this order, after the projection.
        distance: mse, l1, cosine or kl.
        projection: none, or a linear map with bias from the student's size to the teacher's that is
            trained with the student: shared by all pairs, or each its own.

    Raises:
        ExperimentError: Sizes differ without a projection, or a shared one does not fit all.
    """

    def __init__(
        self,
        pairs: list[tuple[State, State]],
        sizes: list[tuple[int, int]],
        transforms: Iterable[str] = (),
        distance: str = "mse",
        projection: str = "none",
    ) -> None:
        super().__init__()
        self.pairs, self.transforms = pairs, list(transforms)
        self.distance = _DISTANCES[distance]
        self.teacher_states = [teacher for teacher, _ in pairs]
        self.student_states = [student for _, student in pairs]
        self.part_names = [""]
        if projection == "none":
            for (teacher_state, student_state), (teacher_size, student_size) in zip(pairs, sizes):
                if teacher_size != student_size:
                    raise ExperimentError(
                        f"the student's {_described(student_state)} has {student_size} entries,"
                        f" the teacher's {_described(teacher_state)} {teacher_size}: set"
                        " projection=each or shared for a learned linear map"
                    )
            self.projections = nn.ModuleList()
        elif projection == "shared":
            if len(set(sizes)) > 1:
                raise ExperimentError(
                    f"projection=shared needs pairs of one size, not {sorted(set(sizes))}: set"
                    " projection=each"
                )
            self.projections = nn.ModuleList([nn.Linear(sizes[0][1], sizes[0][0])])
        else:
            self.projections = nn.ModuleList(
                nn.Linear(student_size, teacher_size) for teacher_size, student_size in sizes
            )

    def forward(
        self,
        teacher: States,
        student: States,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum over pairs of states."""
        total = sum_of(
            self._loss(
                teacher[teacher_state],
                self._projected(number, student[student_state]),
                attention_mask,
            )
            for number, (teacher_state, student_state) in enumerate(self.pairs)
        )
        return total, total.detach()[None]

    def _projected(self, number: int, state: Tensor) -> Tensor:
        state = exact(state)
        if not len(self.projections):
            return state
        projected: Tensor = self.projections[min(number, len(self.projections) - 1)](state)
        return projected

    def _loss(self, teacher: Tensor, student: Tensor, attention_mask: Tensor | None) -> Tensor:
        is_real_BS = None if student.dim() == 2 else is_real(attention_mask, student)
        sides = [_without_padding(side, is_real_BS) for side in (exact(teacher), student)]
        for transform in self.transforms:
            sides = [_TRANSFORMS[transform](side, is_real_BS) for side in sides]
        losses = self.distance(*sides)  # (B) or (B, S)
        if losses.dim() == 1:
            return losses.mean()
        assert is_real_BS is not None
        return (losses.masked_fill(~is_real_BS, 0).sum(dim=1) / is_real_BS.sum(dim=1)).mean()


def _without_padding(state: Tensor, is_real_BS: Tensor | None) -> Tensor:
    """Zeros in its place, so that content that is not finite does no harm."""
    return state if is_real_BS is None else state.masked_fill(~is_real_BS[..., None], 0)


def _first_token(state: Tensor, is_real_BS: Tensor | None) -> Tensor:
    if is_real_BS is None or state.dim() == 2:
        return state
    first_B = is_real_BS.to(torch.uint8).argmax(dim=1)
    return state[torch.arange(len(state), device=state.device), first_B]


def _mean(state: Tensor, is_real_BS: Tensor | None) -> Tensor:
    if is_real_BS is None or state.dim() == 2:
        return state
    return state.sum(dim=1) / is_real_BS.sum(dim=1, keepdim=True)


def _normalize(state: Tensor, _: Tensor | None) -> Tensor:
    return nn.functional.normalize(state, dim=-1)


_TRANSFORMS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "first_token": _first_token,
    "mean": _mean,
    "normalize": _normalize,
}


def pool(state: Tensor, attention_mask: Tensor, name: str) -> Tensor:
    """One vector for each sequence (B, D) from (B, S, D): its `mean`, or its `first_token`."""
    is_real_BS = is_real(attention_mask, state)
    return _TRANSFORMS[name](_without_padding(state, is_real_BS), is_real_BS)


def embed(state: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Sentence embeddings (B, D) of last hidden states (B, S, D), as the pooling makes them."""
    embeddings = pool(state, attention_mask, pooling.name)
    return nn.functional.normalize(embeddings, dim=-1) if pooling.normalises else embeddings


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    return nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda teacher, student: (student - teacher).square().mean(-1),
    "l1": lambda teacher, student: (student - teacher).abs().mean(-1),
    "cosine": lambda teacher, student: 1 - nn.functional.cosine_similarity(teacher, student, -1),
    "kl": _kl,
}


def exact(state: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    return state.to(torch.promote_types(state.dtype, torch.float32))


def is_real(attention_mask: Tensor | None, state: Tensor) -> Tensor:
    """Which tokens (B, S) are no padding; without a mask all."""
    if attention_mask is None:
        return torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
    return attention_mask.bool()


def _described(state: State) -> str:
    return f"{state.name} of layer {state.layer}" if state.layer else state.name


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum, as a tensor; there is at least one."""
    return torch.stack(list(tensors)).sum(dim=0)
