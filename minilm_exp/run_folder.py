"""Where a run lies on disk, and whether it has been done before."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from minilm_exp.checkpoints import last_whole_checkpoint
from minilm_exp.provenance import fingerprint_model
from minilm_exp.redaction import redact
from minilm_exp.result import Result, read_result, read_results, standing
from minilm_exp.settings import Settings

_log = logging.getLogger(__name__)


def run_name(settings: Settings) -> str:
    """What the run is about and its seed, fit for a folder."""
    if settings.recipe.name == "finetune":
        path = Path(settings.student.path or "")
        student = path.parent.name if path.name == "student" else path.name
        models = {"student": student, "teacher": settings.teacher.name}
        names = [models[role][:60] for role in settings.recipe.models] + [*settings.tasks][:3]
        name = "finetune-" + "-".join(names)
    else:
        name = f"{settings.teacher.name}-{settings.student_name}-{settings.objective_name}"
        if settings.stages:
            name = f"{settings.teacher.name}-{settings.student_name}-{settings.recipe.name}"
            if any(stage.settings.objective == settings.objective for stage in settings.stages):
                name += f"-{settings.objective_name}"
    return re.sub(r"[^A-Za-z0-9._-]+", "_", redact(f"{name}-seed{settings.seed}"))


def finished_run(settings: Settings, key: str) -> Result | None:
    """The finished run of this key whose student or fine-tuned models are still there, or None.

    A student whose files are not those that were written is not there.
    """
    needed = []
    if settings.recipe.name != "finetune" and settings.origin.settings.data == "corpus":
        needed.append("student/config.json")
    is_trained = any(task.is_trained for task in settings.tasks.values())
    if settings.recipe.keep_models and is_trained:
        needed.append("models")
    elif not needed:
        needed.append("predictions")
    for result in standing_runs(settings, key):
        if all((Path(result.folder) / name).exists() for name in needed) and _is_sound(result):
            return result
    return None


def _is_sound(result: Result) -> bool:
    student = Path(result.folder) / "student"
    if result.student_fingerprint is None or not student.is_dir():
        return True
    if fingerprint_model(student) == result.student_fingerprint:
        return True
    _log.warning("%s is damaged: the run is made again beside it", student)
    return False


def standing_runs(settings: Settings, key: str) -> list[Result]:
    """The finished runs of this key that no other replaces."""
    return standing(read_results(_folders(settings, key)), key)


def choose_folder(settings: Settings, key: str) -> tuple[Path, list[str]]:
    """The folder to run in, and the MLflow ids of unfinished runs of the same key.

    Never a folder with a finished run in it. An unfinished run that has a checkpoint is gone on
    from with resume=true and else left where it is. The key must be claimed, see `claim`.
    """
    interrupted: list[str] = []
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        folder = settings.outputs / "runs" / f"{run_name(settings)}-{key[:10]}{suffix}"
        result = read_result(folder)
        if result is None:
            return folder, interrupted
        if result.status != "FINISHED":
            interrupted.append(result.run_id)
            if settings.resume or not _has_work(folder):
                return folder, interrupted
            _log.warning(
                "an unfinished run lies in %s: resume=true goes on from its last checkpoint; this"
                " one starts from the beginning beside it",
                folder,
            )
        number += 1


def _has_work(folder: Path) -> bool:
    """Whether something lies there that a resumed run would not compute again."""
    stages = folder / "stages"
    places = [folder, *(stages.iterdir() if stages.is_dir() else ())]
    finetuning = [*(folder / "finetuning").glob("*/*")]
    checkpoints = [
        *(place / "checkpoints" for place in places),
        *(place for place in finetuning if place.name.endswith("checkpoints")),
    ]
    return (
        any((place / "losses.json").is_file() for place in places)
        or any((place / "config.json").is_file() for place in finetuning)
        or any(last_whole_checkpoint(place) is not None for place in checkpoints)
        or any((folder / "models").glob("*/finetuning_key"))
    )


def take_folder(folder: Path, resume: bool) -> Result | None:
    """Makes the folder ready; gives the unfinished result that lies in it.

    Without resume, what an unfinished run left is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = read_result(folder)
    if not resume:
        shutil.rmtree(folder)
        folder.mkdir()
    return left


def _folders(settings: Settings, key: str) -> list[Path]:
    return sorted((settings.outputs / "runs").glob(f"*-{key[:10]}*/"))
