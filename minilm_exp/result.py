"""What a run found, as it stands in result.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Result:
    """Measured values of one run; what was not computed is absent, never zero."""

    run_id: str
    run_key: str
    status: str
    folder: str
    meaningful: bool
    scores: dict[str, float] = field(default_factory=dict)
    undistilled_scores: dict[str, float] = field(default_factory=dict)
    teacher_scores: dict[str, float] = field(default_factory=dict)
    validation_relation_loss: float | None = None
    validation_relation_losses: dict[str, float] = field(default_factory=dict)
    speedup: float | None = None
    num_parameters: int | None = None
    num_layer_parameters: int | None = None
    teacher_num_parameters: int | None = None
    teacher_num_layer_parameters: int | None = None
    elapsed_seconds: float | None = None
    error: str | None = None

    @property
    def score(self) -> float | None:
        """What a sweep maximises: the mean score, or minus the relation loss without tasks."""
        if self.scores:
            return sum(self.scores.values()) / len(self.scores)
        if self.validation_relation_loss is not None:
            return -self.validation_relation_loss
        return None

    def write(self) -> None:
        """Writes result.json into the run folder, whole or not at all."""
        target = Path(self.folder) / "result.json"
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(target)


def read_result(folder: Path) -> Result | None:
    """The result in a run folder, or None where there is no readable one."""
    try:
        return Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
