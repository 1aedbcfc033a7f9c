"""The stages of a recipe that read a task's data: from students to fine-tuned students."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_text, fingerprint_tokenizer
from minilm_exp.settings import Settings, Stage
from minilm_exp.student import set_dropout
from minilm_exp.task_settings import LIMITS
from minilm_exp.tasks.finetune import (
    Finetuning,
    Guide,
    Scored,
    build_guide_objective,
    finetune,
    load_finetuned,
    with_head,
)
from minilm_exp.tracking import Tracker
from minilm_exp.vocabulary import match_vocabularies


@dataclass(frozen=True)
class Model:
    """A model to be scored: an encoder without a head, and its tokenizer.

    Where it writes, it begins with the head of masked language modelling of its checkpoint. A
    classifier is the same encoder under a head that is scored as it is.
    """

    encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    lm_head: dict[str, Tensor] = field(default_factory=dict)
    classifier: PreTrainedModel | None = None

    def fingerprint_for(self, kind: str) -> str:
        """Of all that a task of this kind takes of it."""
        if kind != "generation" or not self.lm_head:
            return self.fingerprint
        digest = xxhash.xxh3_128(self.fingerprint.encode())
        for name, tensor in sorted(self.lm_head.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the weights, the architecture and the tokenizer; dropout is the task's."""
        digest = xxhash.xxh3_128()
        model = self.encoder if self.classifier is None else self.classifier
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy())
        config = copy.deepcopy(self.encoder.config)
        set_dropout(config, 0.0, 0.0)
        facts = config.to_dict()
        for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
            facts.pop(name, None)
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        digest.update(fingerprint_tokenizer(self.tokenizer).encode())
        return digest.hexdigest()


# Gives the folder of a model of this name after its fine-tuning on the task of the job.
FinetunedTeacher = Callable[[Finetuning, str], Path]


class TaskStages:
    """Runs the stages on tasks of one run, for one task and seed at a time.

    Each but the last leaves its model, with its head, in a folder of the job, where the next stages
    and a resumed run find it. A teacher that is no stage on a task is fine-tuned on it first.

    Args:
        settings: The run.
        models: Encoders by name: the teacher, the students of the stages on the corpus, and the
            students that stages on tasks begin with where they name no start.
    """

    def __init__(self, settings: Settings, models: dict[str, Model]) -> None:
        self.settings, self.models = settings, models
        self.stages: list[Stage] = settings.task_stages
        self._names = {stage.name for stage in self.stages}

    def check(self, job: Finetuning) -> None:
        """Makes the objective of every stage, before hours go into what comes first.

        Raises:
            ExperimentError: One of them cannot be made.
        """
        for stage in self.stages:
            try:
                student = with_head(self._origin(stage).encoder, job)
                teacher = with_head(self._teacher_origin(stage).encoder, job)
                build_guide_objective(student, Guide(teacher, stage.settings), job)
            except ExperimentError as error:
                raise ExperimentError(f"recipe.stages.{stage.name}: {error}") from error

    def fingerprint(self, job: Finetuning) -> str:
        """Of all that the stages hang on beside the job itself."""
        training = self.settings.task_training
        definition = [
            [
                [[name, asdict(term)] for name, term in stage.settings.objective.terms.items()],
                stage.settings.layer_selection.teacher_layer,
                stage.task_training,
                stage.head_only,
                stage.start if stage.start in self._names else self._origin(stage).fingerprint,
                stage.teacher
                if stage.teacher in self._names
                else self.models[stage.teacher].fingerprint,
            ]
            for stage in self.stages
        ]
        teachers = [
            {name: value for name, value in cell.as_dict().items() if name not in LIMITS}
            for cell in training.cells(job.name, job.task)
        ]
        seeds = training.seeds(self.settings.seed)
        return fingerprint_text(json.dumps([definition, teachers, seeds], sort_keys=True))

    def run(
        self,
        job: Finetuning,
        place: Path,
        title: str,
        tracker: Tracker,
        run: Tracker,
        finetuned_teacher: FinetunedTeacher,
        keep_in: Path | None,
    ) -> Scored:
        """Runs what is not finished, and gives what the last stage's student scores.

        Args:
            job: The task, its data and the settings of its fine-tuning.
            place: Folder of the job.
            title: Shown by progress bars, and the name of MLflow runs.
            tracker: Of the last stage.
            run: Of the whole run, below which the other stages are.
            finetuned_teacher: Fine-tunes a teacher.
            keep_in: Folder for the last student, or None.

        Raises:
            ExperimentError: A stage cannot be trained.
        """
        for stage in self.stages:
            is_last = stage is self.stages[-1]
            folder = place / stage.name
            if not is_last and folder.is_dir():
                # It may have been killed right after.
                self._child(run, stage, job, place, title).finish("FINISHED")
                continue
            if stage.teacher in self._names:
                teacher_folder = place / stage.teacher
            else:
                teacher_folder = finetuned_teacher(job, stage.teacher)
            teacher = load_finetuned(teacher_folder, job.task.kind).eval().requires_grad_(False)
            model = self._origin(stage)
            encoder = model.encoder
            if stage.start in self._names:
                encoder = load_finetuned(place / str(stage.start), job.task.kind)
            ids = match_vocabularies(model.tokenizer, self._teacher_origin(stage).tokenizer)
            guide = Guide(teacher, stage.settings, stage.head_only, ids)
            own = _own(job, stage)
            checkpoints = place / f"{stage.name}.checkpoints"
            if is_last:
                child, saved = tracker, keep_in
            else:
                child = self._child(run, stage, job, place, title)
                saved = place / f"{stage.name}.partial"
            try:
                if not is_last:
                    child.log_params(self.params(job, stage))
                scored = finetune(
                    encoder, model.tokenizer, own, f"{title}, {stage.name}", child.log_metrics,
                    saved, guide, checkpoints,
                )  # fmt: skip
            except BaseException as error:
                if not is_last:
                    child.fail(error)
                raise
            if not is_last:
                assert saved is not None
                saved.rename(folder)
                child.finish("FINISHED")
                shutil.rmtree(checkpoints, ignore_errors=True)
        return scored

    def params(self, job: Finetuning, stage: Stage | None = None) -> dict[str, Any]:
        """What a stage, by default the last, is recorded with."""
        stage = stage or self.stages[-1]
        return {
            "stage": stage.name,
            "task": job.name,
            "seed": job.seed,
            "teacher": stage.teacher,
            "start": stage.start or stage.settings.student.init,
            "objective": stage.settings.objective_name,
            "head_only": stage.head_only,
        } | _own(job, stage).settings.as_dict()

    @staticmethod
    def _child(run: Tracker, stage: Stage, job: Finetuning, place: Path, title: str) -> Tracker:
        tags = {"stage": stage.name, "task": job.name, "seed": str(job.seed)}
        name = f"stage {stage.name}: {title} seed={job.seed}"
        return run.child(name, tags, place / f"{stage.name}.run_id")

    def _origin(self, stage: Stage) -> Model:
        """The encoder that a stage's student began as."""
        while stage.start in self._names:
            stage = next(other for other in self.stages if other.name == stage.start)
        return self.models[stage.start or stage.name]

    def _teacher_origin(self, stage: Stage) -> Model:
        for other in self.stages:
            if other.name == stage.teacher:
                return self._origin(other)
        return self.models[stage.teacher]


def _own(job: Finetuning, stage: Stage) -> Finetuning:
    return replace(job, settings=replace(job.settings, **stage.task_training))
