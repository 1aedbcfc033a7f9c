"""What is distilled: the terms of an objective, and which layers each of them compares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minilm_exp.errors import ExperimentError, key_of, reason_of

STATE_LETTERS = {"q": "query", "k": "key", "v": "value"}
DISTANCES = ("mse", "l1", "cosine", "kl")
SOFT_DISTANCES = ("ce", "kl", "mse")
TRANSFORMS = ("first_token", "mean", "normalize")
PROJECTIONS = ("none", "shared", "each")
LAYERS = ("selected", "last", "uniform", "uniform_from_embeddings", "skip", "last_layers")


@dataclass
class RelationTerm:
    """Self-attention relations (MiniLM, MiniLMv2).

    Attributes:
        pairs: Relations as two letters of q, k and v.
        num_relation_heads: Parts of each state; the teacher's attention heads in MiniLM v1.
        layers: A name of `LAYERS`, or pairs [teacher layer, student layer]; losses are summed.
        is_attention: Whether qk must be the attention distribution itself, for which all three
            numbers of heads must be the same.
    """

    pairs: list[str]
    num_relation_heads: int
    layers: Any = "selected"
    is_attention: bool = False
    weight: float = 1.0
    kind: str = "relations"

    @property
    def state_pairs(self) -> list[tuple[str, str]]:
        """The pairs with the states' full names."""
        return [(STATE_LETTERS[pair[0]], STATE_LETTERS[pair[1]]) for pair in self.pairs]


@dataclass
class ScoreTerm:
    """Attention scores before the softmax (TinyBERT).

    Attributes:
        layers: As for relations.
    """

    layers: Any = "uniform"
    weight: float = 1.0
    kind: str = "attention_scores"


@dataclass
class StateTerm:
    """Any states of both models, compared one by one.

    Attributes:
        state: hidden (layer outputs; layer 0 is the embeddings), query, key, value, or
            last_hidden_state.
        layers: As for relations; last_hidden_state has none.
        modules: Instead of state and layers: pairs [teacher module, student module] by dotted path,
            whose outputs are compared.
        transforms: What is done to both sides first, in this order, of `TRANSFORMS`.
        distance: One of `DISTANCES`.
        projection: A learned linear map of the student's states to the teacher's size: none, one
            that all layers share, or one for each pair.
    """

    state: str = "hidden"
    layers: Any = "last"
    modules: Optional[list[list[str]]] = None
    transforms: list[str] = field(default_factory=list)
    distance: str = "mse"
    projection: str = "none"
    weight: float = 1.0
    kind: str = "states"


@dataclass
class LogitTerm:
    """The teacher's predictions as soft labels: of a task, or of masked language modelling.

    Attributes:
        distance: ce, kl or mse; of a regression always mse.
        temperature: Both sides are divided by it before the softmax, and the loss is multiplied by
            its square; mse has none.
        tokens: Of masked language modelling: masked, or all.
    """

    distance: str = "ce"
    temperature: float = 1.0
    tokens: str = "masked"
    weight: float = 1.0
    kind: str = "logits"


@dataclass
class LabelTerm:
    """The labels of the data, as in fine-tuning; on a corpus the masked tokens themselves."""

    weight: float = 1.0
    kind: str = "labels"


AnyTerm = RelationTerm | ScoreTerm | StateTerm | LogitTerm | LabelTerm
_KINDS: dict[str, type] = {
    "relations": RelationTerm,
    "attention_scores": ScoreTerm,
    "states": StateTerm,
    "logits": LogitTerm,
    "labels": LabelTerm,
}


def trains_head(terms: dict[str, AnyTerm]) -> bool:
    """Whether a term compares predictions, so that both models need a head."""
    return any(isinstance(term, (LogitTerm, LabelTerm)) for term in terms.values())


@dataclass
class Objective:
    """A weighted sum of terms.

    Attributes:
        name: The option of the config group.
        terms: By name.
        reads_relation_set: Whether a term takes its values from the group relation_set; found out
            when the config is read.
        is_read: Whether a stage has no objective of its own; likewise.
    """

    name: str
    terms: dict[str, Any]
    reads_relation_set: bool = False
    is_read: bool = True


def parse_terms(terms: dict[str, Any]) -> dict[str, AnyTerm]:
    """The typed terms of the composed config's `objective.terms`.

    Raises:
        ExperimentError: A key or value is wrong or missing.
    """
    parsed: dict[str, AnyTerm] = {}
    for name, node in terms.items():
        where = f"objective.terms.{name}"
        kind = node.get("kind") if isinstance(node, dict) else None
        if name in ("total", "") or "/" in name:
            raise ExperimentError(f"{where}: a term cannot have the name {name!r}; choose another")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ExperimentError(f"{where}.kind={kind} is not one of {', '.join(_KINDS)}")
        try:
            typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_KINDS[kind]), node))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            key = ".".join(filter(None, (where, key_of(error))))
            message = reason_of(error)
            if "missing mandatory value" in message.lower():
                message = f"no value is given: add {key}=VALUE"
            elif "not in" in message:
                message = f"terms of kind {kind} have no such setting"
            raise ExperimentError(f"{key}: {message}") from error
        assert isinstance(typed, AnyTerm)
        parsed[name] = typed
    return parsed


def layer_pairs(
    layers: Any, num_teacher_layers: int, num_student_layers: int, teacher_layer: int
) -> list[tuple[int, int]]:
    """Pairs of a teacher's and a student's layer, counted from 1; 0 is the embeddings.

    - selected: layer_selection's teacher layer with the student's last (MiniLMv2).
    - last: the last of both (MiniLM, eq. 6 to 10).
    - uniform: student layer m of M with teacher layer round(m L / M) of L (TinyBERT's g(m), and
      MiniLM's Table 7); `uniform_from_embeddings` adds the embeddings (general_distill.py).
    - skip: the same without the student's last layer (Patient-KD's PKD-skip).
    - last_layers: student layers 1 to M-1 with the teacher's M-1 layers below its last (PKD-last).

    Args:
        layers: One of these names, or a list of pairs, which is returned.
        num_teacher_layers: L.
        num_student_layers: M.
        teacher_layer: Of layer_selection.
    """
    highest, last = num_teacher_layers, num_student_layers
    uniform = [(round(m * highest / last), m) for m in range(1, last + 1)]
    named = {
        "selected": [(teacher_layer, last)],
        "last": [(highest, last)],
        "uniform": uniform,
        "uniform_from_embeddings": [(0, 0), *uniform],
        "skip": uniform[:-1],
        "last_layers": [(highest - last + m, m) for m in range(1, last)],
    }
    if isinstance(layers, str):
        return named[layers]
    return [(int(teacher), int(student)) for teacher, student in layers]


def check_terms(
    terms: dict[str, AnyTerm],
    num_teacher_layers: int,
    num_student_layers: int,
    teacher_layer: int,
) -> None:
    """Refuses terms that no model could have.

    Raises:
        ExperimentError: Names the value, the rule and the setting.
    """
    if not terms:
        raise ExperimentError("objective.terms={} has no term: choose an objective, see --help")
    for name, term in terms.items():
        where = f"objective.terms.{name}"
        if not (term.weight > 0 and math.isfinite(term.weight)):
            raise ExperimentError(
                f"{where}.weight={term.weight} must be a finite number above 0; leave a term out"
                f" with ~{where}"
            )
        if isinstance(term, LogitTerm):
            _check_logit_term(where, term)
        if isinstance(term, (LogitTerm, LabelTerm)):
            continue
        if isinstance(term, StateTerm):
            _check_state_term(where, term)
            if term.modules is not None or term.state == "last_hidden_state":
                continue
        lowest = 0 if isinstance(term, StateTerm) and term.state == "hidden" else 1
        _check_layers(where, term.layers)
        pairs = layer_pairs(term.layers, num_teacher_layers, num_student_layers, teacher_layer)
        if not pairs:
            raise ExperimentError(
                f"{where}.layers={term.layers} is empty for a student of {num_student_layers}"
                " layers: give more layers, or leave the term out"
            )
        for pair in pairs:
            for owner, layer, highest in zip(
                ("teacher", "student"), pair, (num_teacher_layers, num_student_layers)
            ):
                if not lowest <= layer <= highest:
                    raise ExperimentError(
                        f"{where}.layers={term.layers}: the {owner} has layers {lowest}..{highest},"
                        f" not {layer}"
                    )


def _check_layers(where: str, layers: Any) -> None:
    if isinstance(layers, str):
        if layers not in LAYERS:
            raise ExperimentError(
                f"{where}.layers={layers} is not one of {', '.join(LAYERS)}, or pairs"
                " [[teacher layer, student layer], ...]"
            )
        return
    is_list = isinstance(layers, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(layer) is int for layer in pair)
        for pair in layers
    )
    if not is_list:
        raise ExperimentError(
            f"{where}.layers={layers} must be a name or pairs [[teacher layer, student layer], ...]"
        )


def _check_logit_term(where: str, term: LogitTerm) -> None:
    for name, value, choices in (
        ("distance", term.distance, SOFT_DISTANCES),
        ("tokens", term.tokens, ("masked", "all")),
    ):
        if value not in choices:
            raise ExperimentError(f"{where}.{name}={value} is not one of {', '.join(choices)}")
    if not (term.temperature > 0 and math.isfinite(term.temperature)):
        raise ExperimentError(
            f"{where}.temperature={term.temperature} must be a finite number above 0"
        )
    if term.distance == "mse" and term.temperature != 1:
        raise ExperimentError(
            f"{where}.temperature={term.temperature} makes no difference with distance=mse, where"
            " it cancels against its square: leave it at 1"
        )


def _check_state_term(where: str, term: StateTerm) -> None:
    states = ("hidden", *STATE_LETTERS.values(), "last_hidden_state")
    for name, value, choices in (
        ("state", term.state, states),
        ("distance", term.distance, DISTANCES),
        ("projection", term.projection, PROJECTIONS),
        *(("transforms", transform, TRANSFORMS) for transform in term.transforms),
    ):
        if value not in choices:
            raise ExperimentError(f"{where}.{name}={value} is not one of {', '.join(choices)}")
    if len({"first_token", "mean"} & set(term.transforms)) == 2:
        raise ExperimentError(
            f"{where}.transforms={term.transforms}: first_token or mean, not both"
        )
    if term.modules is not None and not (
        term.modules and all(len(pair) == 2 and all(pair) for pair in term.modules)
    ):
        raise ExperimentError(
            f"{where}.modules={term.modules} must be pairs [[teacher module, student module], ...]"
        )
    named = {path for pair in term.modules or [] for path in pair}
    if named & {*states}:
        raise ExperimentError(
            f"{where}.modules={term.modules}: {', '.join(sorted(named & {*states}))} is no module;"
            f" set {where}.state"
        )
