"""The terms of an objective that compare predictions: with the teacher's, and with the labels.

As for the terms on states: the mean over what one sequence predicts (real tokens of spans, selected
tokens of masked language modelling), then the mean over the sequences of a batch; padding changes
neither value nor gradient; float32 whatever the autocast data type; divergences are
teacher || student.

Shape suffixes in this file:
    B sequences   S tokens per sequence, padded   C classes
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minilm_exp.states import LOGITS, SPAN_LOGITS, State
from minilm_exp.terms import States, Term, exact, is_real, sum_of

# What stands in the place of a label where there is none.
NO_LABEL = -100


class SoftLabels(Term):
    """The teacher's predictions as targets (Hinton et al., arXiv:1503.02531).

    - ce: T^2 x cross-entropy of softmax(z_S / T) under softmax(z_T / T), summed over classes.
      Intel's `KnowledgeLoss` has the factor T^2, TextBrewer and TinyBERT's code have not;
      TinyBERT's also divides by the number of classes.
    - kl: T^2 x KL(teacher || student), summed over classes: ce without the teacher's entropy, so
      with the same gradient. Patient-KD's code and Intel's option KL divide by the number of
      classes too, so their weight is smaller by that.
    - mse: mean over the classes of (z_S - z_T)^2. A temperature would cancel against T^2. Of a
      regression, which has no classes, it is always this.

    Of spans, classes are the real tokens; the loss is the mean of that of starts and of ends. Of
    masked language modelling it is the mean over the tokens of a sequence.

    Args:
        head: classification, regression, spans or masked_lm.
        distance: ce, kl or mse.
        temperature: T.
        tokens: Of masked_lm: `masked`, those that were selected for prediction, or `all` real ones
            (DistilBERT without restrict_ce_to_mask).
    """

    def __init__(
        self, head: str, distance: str = "ce", temperature: float = 1.0, tokens: str = "masked"
    ) -> None:
        super().__init__()
        self.head, self.tokens = head, tokens
        self.distance = "mse" if head == "regression" else distance
        self.temperature = temperature
        self.reads_labels = head == "masked_lm" and tokens == "masked"
        self.teacher_states = self.student_states = head_states(head)
        self.part_names = [""]

    def forward(
        self,
        teacher: States,
        student: States,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss; `labels` only say which tokens were selected."""
        pairs = [(teacher[state].detach(), student[state]) for state in self.student_states]
        if self.head == "spans":
            is_real_BS = is_real(attention_mask, pairs[0][1])
            losses_B = sum_of(self._distances(*pair, is_real_BS) for pair in pairs) / 2
        elif self.head == "masked_lm":
            if self.tokens == "masked":
                assert labels is not None
                counts_BS = labels != NO_LABEL
            else:
                counts_BS = is_real(attention_mask, pairs[0][1])
            teacher_NC, student_NC = (side[counts_BS] for side in pairs[0])
            losses_B = mean_by_sequence(self._distances(teacher_NC, student_NC), counts_BS)
        else:
            losses_B = self._distances(*pairs[0])
        total = losses_B.mean()
        return total, total.detach()[None]

    def _distances(
        self, teacher: Tensor, student: Tensor, is_class: Tensor | None = None
    ) -> Tensor:
        """Over the last dimension, of which a mask may say what are classes at all."""
        teacher, student = exact(teacher), exact(student)
        if self.distance == "mse":
            squares = _filled(student - teacher, is_class, 0).square()
            return squares.mean(-1) if is_class is None else squares.sum(-1) / is_class.sum(-1)
        teacher_log, student_log = (
            _filled(
                (_filled(side, is_class, -math.inf) / self.temperature).log_softmax(-1), is_class, 0
            )
            for side in (teacher, student)
        )
        target = teacher_log.exp()
        compared = student_log if self.distance == "ce" else student_log - teacher_log
        return -(self.temperature**2) * (target * compared).sum(-1)


def _filled(values: Tensor, is_class: Tensor | None, other: float) -> Tensor:
    return values if is_class is None else values.masked_fill(~is_class, other)


class HardLabels(Term):
    """The labels of the data: what fine-tuning alone minimises.

    Cross-entropy of a class, squared error of a number, mean of the cross-entropies of start and
    end over the real tokens of a window, mean cross-entropy of the selected tokens of masked
    language modelling.

    Args:
        head: classification, regression, spans or masked_lm.
    """

    reads_labels = True

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head
        self.teacher_states, self.student_states = [], head_states(head)
        self.part_names = [""]

    def forward(
        self,
        teacher: States,
        student: States,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss for labels (B); of spans starts and ends (B, 2); of masked_lm (B, S)."""
        assert labels is not None
        total = label_loss(self.head, student, attention_mask, labels)
        return total, total.detach()[None]


def label_loss(
    head: str, logits: Mapping[State, Tensor], attention_mask: Tensor | None, labels: Tensor
) -> Tensor:
    """See `HardLabels`; of spans the library's own loss lets an answer begin in the padding."""
    predicted = [exact(logits[state]) for state in head_states(head)]
    if head == "spans":
        losses = []
        for column, tensor_BS in enumerate(predicted):
            real_BS = tensor_BS.masked_fill(~is_real(attention_mask, tensor_BS), -math.inf)
            losses.append(nn.functional.cross_entropy(real_BS, labels[:, column]))
        return torch.stack(losses).mean()
    (values,) = predicted
    if head == "regression":
        return nn.functional.mse_loss(values[:, 0], labels.to(values.dtype))
    if head == "classification":
        return nn.functional.cross_entropy(values, labels)
    counts_BS = labels != NO_LABEL
    losses_N = nn.functional.cross_entropy(values[counts_BS], labels[counts_BS], reduction="none")
    return mean_by_sequence(losses_N, counts_BS).mean()


def head_states(head: str) -> list[State]:
    """What a model with this head returns."""
    return [State(name) for name in (SPAN_LOGITS if head == "spans" else (LOGITS,))]


def mean_by_sequence(losses_N: Tensor, counts_BS: Tensor) -> Tensor:
    """The mean over the counted tokens of each sequence (B); 0 where there is none."""
    spread_BS = torch.zeros(counts_BS.shape, dtype=losses_N.dtype, device=losses_N.device)
    spread_BS = spread_BS.masked_scatter(counts_BS, losses_N)
    return spread_BS.sum(dim=1) / counts_BS.sum(dim=1).clamp(min=1)
