"""Student shapes to choose from, and which of them a budget allows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minilm_exp.errors import ExperimentError
from minilm_exp.settings import Budget, Teacher

# What a budget can name.
TARGETS = ("speedup", "params", "latency_ms")
# Of the teacher's layers and of its hidden size, which MiniLM's students have too: 6, 4 and 3 of 12
# layers, and a half of 768.
_LAYER_SHARES = (1, 5 / 6, 2 / 3, 1 / 2, 5 / 12, 1 / 3, 1 / 4, 1 / 6, 1 / 12)
_WIDTH_SHARES = (1, 3 / 4, 1 / 2, 1 / 3, 1 / 4)
# Of MiniLM's students, 12 heads at hidden size 384.
_SMALLEST_HEAD = 32
_PARAMS = re.compile(r"(\d+(?:\.\d+)?) ?([kmb]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Shape:
    """A student that may be built; `intermediate_size` is null for 4 x hidden_size."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int | None = None

    @property
    def name(self) -> str:
        """As in the papers' tables."""
        return f"{self.num_layers} x {self.hidden_size}"


@dataclass(frozen=True)
class Candidate:
    """A shape and what was measured of it, untrained.

    Attributes:
        shape: The shape.
        parameters: All but the pooler's.
        transformer: Those of its layers.
        milliseconds: Median time of a batch.
        speedup: Median over rounds of the teacher's time by its own.
    """

    shape: Shape
    parameters: int
    transformer: int
    milliseconds: float
    speedup: float

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Candidate:
        """What `asdict` made of it."""
        return cls(**(stored | {"shape": Shape(**stored["shape"])}))


def has_budget(config: Any) -> bool:
    """Whether a composed config leaves the student's shape to a budget."""
    student = config.get("student")
    budget = student.get("budget") if isinstance(student, Mapping) else None
    # What is no group is refused when the settings are read.
    if not isinstance(budget, Mapping):
        return False
    return any(budget.get(name) is not None for name in TARGETS)


def num_params(value: Any) -> float | None:
    """The number behind 20M, 500k or 20000000; None where there is none.

    Raises:
        ExperimentError: It is no such number.
    """
    if value is None:
        return None
    found = _PARAMS.fullmatch(str(value).strip())
    number = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not number or isinstance(value, bool):
        raise ExperimentError(
            f"student.budget.params={value!r:.50} is no number of parameters: write 20M, 500k or"
            " 20000000"
        )
    return number


def check_budget(budget: Budget) -> None:
    """Refuses what no student could be measured against.

    Raises:
        ExperimentError: Names the value, the rule and the setting.
    """
    num_params(budget.params)
    for name, least in (("speedup", 1.0), ("latency_ms", 0.0), ("search_share", 0.0)):
        value = getattr(budget, name)
        if value is not None and not (value > least and math.isfinite(value)):
            raise ExperimentError(
                f"student.budget.{name}={value} must be a finite number above {least:g}"
            )
    if budget.search_share > 1:
        raise ExperimentError(
            f"student.budget.search_share={budget.search_share} must not be above 1, all of"
            " training.max_steps"
        )
    if budget.search not in ("none", "quick"):
        raise ExperimentError(f"student.budget.search={budget.search} is not none or quick")
    for name in ("batch_size", "sequence_length", "threads"):
        value = getattr(budget, name)
        if value is not None and value < 1:
            raise ExperimentError(f"student.budget.{name}={value} must be above 0")
    for name in ("num_layers", "hidden_sizes"):
        values = getattr(budget, name)
        if values is not None and (not values or min(values) < 1):
            raise ExperimentError(f"student.budget.{name}={values} must be numbers above 0")
    if all(getattr(budget, name) is None for name in TARGETS):
        ignored = [
            name
            for name, value in vars(budget).items()
            if value != getattr(Budget(), name) and name != "search_share"
        ]
        if ignored:
            raise ExperimentError(
                f"student.budget.{ignored[0]}={getattr(budget, ignored[0])} makes no difference"
                " without a budget: add student.budget.speedup, params or latency_ms"
            )


def shapes(teacher: Teacher, budget: Budget, same_width: bool) -> list[Shape]:
    """The candidates, each smaller than the teacher: layers x hidden sizes.

    Heads are as many as the teacher's where they divide the hidden size and leave heads of 32 or
    more (MiniLM: 12 of 32 at 384); else the next lower number. A student of the teacher's width has
    its feed-forward size too, so that it can begin with the teacher's layers.

    Args:
        teacher: Its sizes.
        budget: May name layers and hidden sizes.
        same_width: Whether the objective needs students as wide as the teacher.

    Raises:
        ExperimentError: A size that was asked for fits no attention heads, or none is left.
    """
    layers = budget.num_layers or [max(1, round(s * teacher.num_layers)) for s in _LAYER_SHARES]
    widths = budget.hidden_sizes or [
        round(share * teacher.hidden_size)
        for share in _WIDTH_SHARES
        if (share * teacher.hidden_size) % _SMALLEST_HEAD == 0 or share == 1
    ]
    if same_width:
        other = [width for width in budget.hidden_sizes or [] if width != teacher.hidden_size]
        if other:
            raise ExperimentError(
                f"student.budget.hidden_sizes={budget.hidden_sizes}: the objective compares states"
                f" of equal size, so only the teacher's {teacher.hidden_size} will do"
            )
        widths = [teacher.hidden_size]
    found = []
    for width in sorted(set(widths), reverse=True):
        is_teachers = width == teacher.hidden_size
        heads = teacher.num_attention_heads if is_teachers else _num_heads(teacher, width)
        for number in sorted(set(layers), reverse=True):
            if number > teacher.num_layers or width > teacher.hidden_size:
                raise ExperimentError(
                    f"student.budget: {number} x {width} is larger than the teacher's"
                    f" {teacher.num_layers} x {teacher.hidden_size}; leave it out of"
                    " student.budget.num_layers and .hidden_sizes"
                )
            if number < teacher.num_layers or not is_teachers:
                inner = teacher.intermediate_size if is_teachers else None
                found.append(Shape(number, width, heads, inner))
    if not found:
        raise ExperimentError(
            f"student.budget: there is no shape smaller than the teacher's {teacher.num_layers} x"
            f" {teacher.hidden_size}"
        )
    return found


def _num_heads(teacher: Teacher, hidden_size: int) -> int:
    most = max(1, min(teacher.num_attention_heads, hidden_size // _SMALLEST_HEAD))
    return next(number for number in range(most, 0, -1) if hidden_size % number == 0)


def meets(candidate: Candidate, budget: Budget) -> bool:
    """Whether it keeps within all that the budget names."""
    params = num_params(budget.params)
    return (
        (budget.speedup is None or candidate.speedup >= budget.speedup)
        and (params is None or candidate.parameters <= params)
        and (budget.latency_ms is None or candidate.milliseconds <= budget.latency_ms)
    )


def ranked(candidates: list[Candidate], budget: Budget) -> list[Candidate]:
    """Those that meet the budget, the largest first.

    The largest has the most parameters in its Transformer layers, since those of the embeddings
    cost no time; of equals the wider one, which may begin with the teacher's layers.

    Raises:
        ExperimentError: None does; the nearest is named.
    """
    fitting = [candidate for candidate in candidates if meets(candidate, budget)]
    if fitting:
        return sorted(fitting, key=lambda c: (c.transformer, c.shape.hidden_size), reverse=True)
    nearest = min(candidates, key=lambda candidate: _excess(candidate, budget))
    asked = ", ".join(
        f"student.budget.{name}={getattr(budget, name)}"
        for name in TARGETS
        if getattr(budget, name) is not None
    )
    params = num_params(budget.params) or math.inf
    hint = ""
    if min(one.parameters - one.transformer for one in candidates) > params / 2:
        hint = (
            "; most of the parameters are embeddings, of which"
            " student.vocabulary=prune_to_corpus keeps those that the corpus needs"
        )
    raise ExperimentError(
        f"{asked}: none of the {len(candidates)} shapes that were measured meets it; the nearest is"
        f" {nearest.shape.name} with x{nearest.speedup:.2f},"
        f" {nearest.parameters / 1e6:.3g}M parameters and {nearest.milliseconds:.2f} ms a batch:"
        " ask for less, or let smaller ones be tried with student.budget.num_layers and"
        f" .hidden_sizes{hint}"
    )


def _excess(candidate: Candidate, budget: Budget) -> float:
    """By what factor it misses what it misses most."""
    params = num_params(budget.params)
    return max(
        1.0 if budget.speedup is None else budget.speedup / candidate.speedup,
        1.0 if params is None else candidate.parameters / params,
        1.0 if budget.latency_ms is None else candidate.milliseconds / budget.latency_ms,
    )


def table_row(candidate: Candidate, budget: Budget, chosen: Candidate) -> dict[str, Any]:
    """As it is shown and recorded."""
    sizes = asdict(candidate.shape)
    del sizes["intermediate_size"]
    return sizes | {
        "parameters": candidate.parameters,
        "milliseconds": round(candidate.milliseconds, 3),
        "speedup": round(candidate.speedup, 3),
        "meets_budget": meets(candidate, budget),
        "chosen": candidate == chosen,
    }
