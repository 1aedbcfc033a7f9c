"""Objectives: weighted sums of terms, made for a teacher and a student.

Shape suffixes in this file:
    B sequences   S tokens per sequence, padded   T terms
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm_exp.errors import ExperimentError
from minilm_exp.head_terms import HardLabels, SoftLabels
from minilm_exp.objective_settings import (
    AnyTerm,
    LabelTerm,
    LogitTerm,
    RelationTerm,
    ScoreTerm,
    StateTerm,
    layer_pairs,
)
from minilm_exp.settings import Settings
from minilm_exp.states import State, state_size
from minilm_exp.terms import AttentionScores, Relations, StateDistance, States, Term, sum_of


class Objective(nn.Module):
    """The weighted sum of terms.

    Args:
        terms: By name.
        weights: Of each.

    Attributes:
        names: What `forward` returns beside the total: a term's name, or the names of its parts
            below it; of a single term with parts, the parts' own names.
    """

    def __init__(self, terms: dict[str, Term], weights: dict[str, float]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms.values())  # a user may give a term any name
        self._weights = [weights[name] for name in terms]
        self.names = [
            (part if len(terms) == 1 else f"{name}/{part}") if part else name
            for name, term in terms.items()
            for part in term.part_names
        ]

    @property
    def teacher_states(self) -> set[State]:
        """What the terms need of the teacher."""
        return {state for term in self._terms() for state in term.teacher_states}

    @property
    def student_states(self) -> set[State]:
        """What the terms need of the student."""
        return {state for term in self._terms() for state in term.student_states}

    @property
    def reads_labels(self) -> bool:
        """Whether a term needs the labels of the data."""
        return any(term.reads_labels for term in self._terms())

    def forward(
        self,
        teacher: States,
        student: States,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum, and each of `names` without weight and without a gradient (T)."""
        device_type = next(iter(student.values())).device.type
        totals, parts = [], []
        with torch.autocast(device_type, enabled=False):
            for weight, term in zip(self._weights, self.terms):
                total, parts_of_term = term(teacher, student, attention_mask, labels)
                totals.append(weight * total)
                parts.append(parts_of_term)
        return sum_of(totals), torch.cat(parts)

    def _terms(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]


def build_objective(
    settings: Settings,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    head: str | None = None,
) -> Objective:
    """The objective for these two models, with its linear maps made.

    Args:
        settings: The run; its seed draws the linear maps, as `nn.Linear` does it.
        teacher: Gives the number of layers and heads, and the sizes of states.
        student: The same.
        head: What both predict: classification, regression, spans or masked_lm; None for encoders.

    Raises:
        ExperimentError: A term needs what a model lacks, or sizes do not fit.
    """
    torch.manual_seed(settings.seed)
    terms: dict[str, AnyTerm] = settings.objective.terms
    num_layers = [model.config.num_hidden_layers for model in (teacher, student)]
    numbers = (num_layers[0], num_layers[1], settings.layer_selection.teacher_layer)
    kernel = settings.runtime.relation_kernel
    built: dict[str, Term] = {}
    for name, term in terms.items():
        try:
            if isinstance(term, RelationTerm):
                layers = layer_pairs(term.layers, *numbers)
                heads = term.num_relation_heads
                built[name] = Relations(layers, term.state_pairs, heads, kernel)
            elif isinstance(term, ScoreTerm):
                layers = layer_pairs(term.layers, *numbers)
                built[name] = AttentionScores(layers, _same_heads(teacher, student))
            elif isinstance(term, (LogitTerm, LabelTerm)):
                built[name] = _head_term(term, teacher, student, head)
            else:
                pairs = _state_pairs(term, numbers)
                sizes = [(state_size(teacher, a), state_size(student, b)) for a, b in pairs]
                built[name] = StateDistance(
                    pairs, sizes, term.transforms, term.distance, term.projection
                )
        except ExperimentError as error:
            raise ExperimentError(f"objective.terms.{name}: {error}") from error
    return Objective(built, {name: term.weight for name, term in terms.items()})


def _state_pairs(term: StateTerm, numbers: tuple[int, int, int]) -> list[tuple[State, State]]:
    if term.modules is not None:
        return [(State(teacher), State(student)) for teacher, student in term.modules]
    if term.state == "last_hidden_state":
        return [(State(term.state), State(term.state))]
    return [
        (State(term.state, teacher_layer), State(term.state, student_layer))
        for teacher_layer, student_layer in layer_pairs(term.layers, *numbers)
    ]


def _head_term(
    term: LogitTerm | LabelTerm,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    head: str | None,
) -> Term:
    if head is None:
        raise ExperimentError("it compares predictions, and an encoder without a head has none")
    if isinstance(term, LabelTerm):
        return HardLabels(head)
    name = "vocab_size" if head == "masked_lm" else "num_labels"
    numbers = [getattr(model.config, name) for model in (teacher, student)]
    if numbers[0] != numbers[1]:
        raise ExperimentError(
            f"the teacher predicts one of {numbers[0]}, the student one of {numbers[1]}: soft"
            " labels need the same classes or tokens on both sides"
        )
    return SoftLabels(head, term.distance, term.temperature, term.tokens)


def _same_heads(teacher: PreTrainedModel, student: PreTrainedModel) -> int:
    heads = [model.config.num_attention_heads for model in (teacher, student)]
    if heads[0] != heads[1]:
        raise ExperimentError(
            f"attention scores need as many attention heads in both models, not {heads[0]} and"
            f" {heads[1]}: set student.num_attention_heads={heads[0]}, or use relations"
        )
    return int(heads[0])
