"""Scores of models on downstream tasks: every model, cell of a search and seed, each done once."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minilm_exp.documents import read_documents
from minilm_exp.errors import ExperimentError
from minilm_exp.precision import resolve_precision
from minilm_exp.provenance import RESULTS_VERSION, fingerprint_text
from minilm_exp.result import write_json
from minilm_exp.settings import Settings
from minilm_exp.task_settings import LIMITS, Task, TaskSettings, TeacherLabels
from minilm_exp.task_stages import Model, TaskStages
from minilm_exp.tasks.data import load_task
from minilm_exp.tasks.examples import Examples, TaskData, part_name
from minilm_exp.tasks.finetune import Finetuning, Scored, finetune, score_as_it_is
from minilm_exp.tasks.metrics import check_labels, check_score_names
from minilm_exp.tasks.next_passage import make_next_passage
from minilm_exp.tasks.similarity import score_similarity
from minilm_exp.tasks.splits import Splits, find_splits
from minilm_exp.tasks.teacher_labels import in_names_of_teacher, label, make_teacher_labels
from minilm_exp.tracking import Tracker

_log = logging.getLogger(__name__)
# Sources with their targets and outputs that MLflow shows.
_NUM_EXAMPLES = 20


@dataclass
class Cell:
    """One combination of fine-tuning settings, over its seeds.

    Attributes:
        settings: Those that the search changes.
        mean: Of each metric, over the seeds.
        spread: Standard deviation over the seeds, where there are several.
        num_seeds: Fine-tunings in the mean.
        error: Why there is no mean.
    """

    settings: dict[str, Any]
    mean: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    num_seeds: int = 0
    error: str | None = None


@dataclass
class TaskScore:
    """What a model scores on a task: its best cell, and all cells of the search."""

    best: Cell
    cells: list[Cell]


def find_tasks(settings: Settings) -> dict[str, Splits]:
    """Where the data of the tasks with labelled data are; nothing is read yet.

    Raises:
        ExperimentError: They are not to be had.
    """
    return {
        name: find_splits(name, task, settings.data_root, settings.task_training.test)
        for name, task in settings.tasks.items()
        if isinstance(task, Task)
    }


def load_tasks(
    settings: Settings,
    splits: dict[str, Splits],
    held_out_documents: list[str],
    classifier: Model | None = None,
) -> dict[str, TaskData]:
    """Examples of every task, read and checked before distilling so that a mistake costs nothing.

    Args:
        settings: The run.
        splits: What `find_tasks` found.
        held_out_documents: Of the corpus, for the tasks that are made from it.
        classifier: A teacher that predicts with its own head, in whose classes the labels are.

    Raises:
        ExperimentError: The data are not what the task needs.
    """
    loaded = {}
    for name, task in settings.tasks.items():
        if isinstance(task, Task):
            data = load_task(name, task, splits[name])
        elif isinstance(task, TeacherLabels):
            texts = read_documents(settings.corpus)
            data = make_teacher_labels(texts, held_out_documents, settings.corpus.split, task)
        else:
            data = make_next_passage(held_out_documents, task)
        cells = settings.task_training.cells(name, task)
        if classifier is not None:
            data = _in_words_of_teacher(name, data, settings, cells[0], classifier)
        check_score_names(name, task, data.validation)
        limits = {cell.max_validation_examples for cell in cells}
        taken = cells[0].max_train_examples
        if taken is not None and taken < len(data.train) and task.is_trained:
            _log.info(
                "%s: trained on %d of %d examples (task_training.max_train_examples)",
                name, taken, len(data.train),
            )  # fmt: skip
        for part, examples in (*data.validation.items(), *data.test.items()):
            for limit in limits:
                check_labels(name, task, part, examples.at_most(limit))
        loaded[name] = data
    return loaded


def _in_words_of_teacher(
    name: str, data: TaskData, settings: Settings, cell: TaskSettings, teacher: Model
) -> TaskData:
    assert teacher.classifier is not None
    if not isinstance(settings.tasks[name], TeacherLabels):
        return in_names_of_teacher(name, data, teacher.classifier)
    precision = resolve_precision(settings.training.precision, settings.runtime.device)
    job = job_of(settings, precision, name, data, cell, settings.seed)
    return label(teacher.classifier, teacher.tokenizer, job)


def job_of(
    settings: Settings,
    precision: str,
    name: str,
    data: TaskData,
    task_settings: TaskSettings,
    seed: int,
) -> Finetuning:
    """One fine-tuning of a run."""
    return Finetuning(
        name=name,
        task=settings.tasks[name],
        data=data,
        settings=task_settings,
        seed=seed,
        precision=precision,
        runtime=settings.runtime,
        cache=settings.outputs / "cache" / "tasks",
        checkpoint_steps=settings.task_training.checkpoint_steps,
    )


@dataclass
class Scoring:
    """Fine-tunes and scores the models of one run.

    What one fine-tuning gave is kept under `outputs/finetuned`, by the content of all that it hangs
    on, so a resumed run does not repeat it, and neither does another run with the same model (a
    teacher beside many students).

    Attributes:
        settings: The run.
        precision: fp32 or bf16.
        folder: The run folder, for predictions and models.
        tracker: Of the run; each fine-tuning is a run below it.
        stages: By which the student learns a task, instead of by its labels.
    """

    settings: Settings
    precision: str
    folder: Path
    tracker: Tracker
    stages: TaskStages | None = None
    _scored: dict[tuple[str, str], TaskScore] = field(default_factory=dict, init=False)

    def check(self, tasks: dict[str, TaskData]) -> None:
        """Whether the stages can be run.

        Raises:
            ExperimentError: One of them cannot.
        """
        if self.stages is None:
            return
        for name, data in tasks.items():
            settings = self.settings.task_training.cells(name, self.settings.tasks[name])[0]
            self.stages.check(self._job(name, data, settings, self.settings.seed))

    def score(self, name: str, data: TaskData, role: str, model: Model) -> TaskScore:
        """The scores of one model on one task.

        A cell of a search that cannot be trained is reported with its error, and the others go on.

        Raises:
            ExperimentError: No cell could be trained.
        """
        if (name, role) not in self._scored:
            self._scored[name, role] = self._score(name, data, role, model)
        return self._scored[name, role]

    def _score(self, name: str, data: TaskData, role: str, model: Model) -> TaskScore:
        task, training = self.settings.tasks[name], self.settings.task_training
        # Nothing of it is trained, so nothing hangs on settings or seed.
        is_fixed = not task.is_trained
        all_settings = training.cells(name, task)[: 1 if is_fixed else None]
        cells: list[Cell] = []
        best: Cell | None = None
        kept = _Kept(self._model_folder(name, role), task.selected_by)
        for settings in all_settings:
            cell = Cell(_searched(settings, all_settings))
            cells.append(cell)
            scored = []
            try:
                for seed in training.seeds(self.settings.seed)[: 1 if is_fixed else None]:
                    job = self._job(name, data, settings, seed)
                    scored.append(self._finetune(job, role, model, cell, kept))
            except ExperimentError as error:
                if len(all_settings) == 1:
                    raise
                cell.error = str(error)
                _log.warning("%s on %s, %s: %s", role, name, cell.settings, error)
                kept.end_cell(is_best=False)
                continue
            _average(cell, scored)
            chosen_by = task.selected_by
            is_best = best is None or cell.mean[chosen_by] > best.mean[chosen_by]
            kept.end_cell(is_best)
            if is_best:
                best = cell
        if best is None:
            raise ExperimentError(
                f"{role} on {name}: none of the {len(cells)} cells of the search could be trained;"
                f" the last: {cells[-1].error}"
            )
        if self._keeps(role) and task.is_trained:
            self._keep_best(name, role, model, kept)
        kept.close()
        outcome = TaskScore(best, cells)
        self._report(name, role, outcome)
        return outcome

    def _job(self, name: str, data: TaskData, settings: TaskSettings, seed: int) -> Finetuning:
        return job_of(self.settings, self.precision, name, data, settings, seed)

    def _model_folder(self, name: str, role: str) -> Path:
        return self.folder / "models" / f"{name}-{role}"

    def _place(self, key: str) -> Path:
        """What an interrupted fine-tuning goes on from."""
        return self.folder / "finetuning" / key

    def _keeps(self, role: str) -> bool:
        """Whether the fine-tuned model stays, also because a stage needs it as its teacher."""
        stages = () if self.stages is None else self.stages.stages
        return self.settings.recipe.keep_models or role in {
            _role_of_teacher(stage.teacher) for stage in stages
        }

    def _finetune(
        self, job: Finetuning, role: str, model: Model, cell: Cell, kept: _Kept
    ) -> Scored:
        """One fine-tuning as a run of its own, or what an earlier one of the same content gave."""
        stages = self.stages if role == "student" else None
        if stages is None:
            key = _key(job, model.fingerprint_for(job.task.kind))
        else:
            key = _key(job, stages.fingerprint(job))
        place = self._place(key)
        file = self.settings.outputs / "finetuned" / f"{key}.json"
        done = self.folder / "finetuned" / key
        stored = _read(file, job)
        if stored is not None and self.settings.rerun:
            stored = stored if stored["parent_id"] == self.tracker.run_id else None
        if stored is not None and done.exists():
            scored = Scored.of(stored, job.task.kind)
            kept.offer(job, key, scored)
            return scored
        title = f"{role} on {job.name}"
        label = ", ".join(f"{name}={value:g}" for name, value in cell.settings.items())
        child = self.tracker.child(
            f"{title} seed={job.seed}" + (f" {label}" if label else ""),
            {"task": job.name, "role": role, "seed": str(job.seed), "finetuning_key": key},
            place / "run_id",
        )
        try:
            params = job.settings.as_dict() if stages is None else stages.params(job)
            child.log_params({"task": job.name, "role": role, "seed": job.seed} | params)
            if stored is not None:
                scored = Scored.of(stored, job.task.kind)
                if stored["run_id"] != child.run_id:
                    child.set_tags({"taken_from": stored["run_id"]})
                if self._keeps(role):
                    kept.copy(Path(stored.get("model", "")), key)
                kept.offer(job, key, scored)
            else:
                scored = self._train(job, role, model, key, title, child, kept)
                # First the model: without it, what is stored would not be whole.
                kept.offer(job, key, scored)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(
                    file,
                    asdict(scored)
                    | {
                        "run_id": child.run_id,
                        "parent_id": self.tracker.run_id,
                        "key": key,
                        "model": str(kept.folder),
                    },
                )
            best = {f"best/{metric}": value for metric, value in scored.metrics.items()}
            child.log_metrics(best | {"best/epoch": scored.best_epoch})
            for path in self._write_predictions(job, role, cell, scored):
                child.log_artifact(path, "predictions")
            if job.task.kind == "generation":
                for part, examples in _scored_parts(job):
                    table = _examples(examples, scored.predictions[part])
                    child.log_table(table, f"examples/{part or 'validation'}.json")
        except BaseException as error:
            child.fail(error)
            raise
        child.finish("FINISHED")
        # A run that goes on does not list it again.
        done.parent.mkdir(exist_ok=True)
        done.touch()
        shutil.rmtree(place, ignore_errors=True)
        return scored

    def _train(
        self,
        job: Finetuning,
        role: str,
        model: Model,
        key: str,
        title: str,
        tracker: Tracker,
        kept: _Kept,
    ) -> Scored:
        """Goes on from the last checkpoint of an interrupted fine-tuning."""
        place = self._place(key)
        folder = kept.next_folder if self._keeps(role) else None
        if model.classifier is not None:
            return score_as_it_is(model.classifier, model.tokenizer, job, title, folder)
        if not job.task.is_trained:
            return score_similarity(model.encoder, model.tokenizer, job)
        if role == "student" and self.stages is not None:
            return self.stages.run(
                job, place, title, tracker, self.tracker, self._finetuned_teacher, folder
            )
        return finetune(
            model.encoder, model.tokenizer, job, title, tracker.log_metrics, folder,
            checkpoints=place / "checkpoints", lm_head=model.lm_head,
        )  # fmt: skip

    def _finetuned_teacher(self, job: Finetuning, name: str) -> Path:
        """The best one of the search and of the seeds."""
        assert self.stages is not None
        role = _role_of_teacher(name)
        self.score(job.name, job.data, role, self.stages.models[name])
        return self._model_folder(job.name, role)

    def _keep_best(self, name: str, role: str, model: Model, kept: _Kept) -> None:
        """Trains the best one again where its result was taken from another run."""
        if kept.is_there():
            return
        assert kept.best is not None
        _log.info(
            "%s on %s: trained again, because its result was kept but not its model", role, name
        )
        title, job = f"{role} on {name}, trained again", kept.best.job
        place = self._place(kept.best.key)
        tags = {"task": name, "role": role, "seed": str(job.seed)}
        child = self.tracker.child(title, tags, place / "run_id")
        try:
            self._train(job, role, model, kept.best.key, title, child, kept)
        except BaseException as error:
            child.fail(error)
            raise
        child.finish("FINISHED")
        kept.take_again()
        shutil.rmtree(place, ignore_errors=True)

    def _write_predictions(
        self, job: Finetuning, role: str, cell: Cell, scored: Scored
    ) -> list[Path]:
        folder = predictions_folder(self.folder, job.name, role, cell.settings, job.seed)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for part, examples in _scored_parts(job):
            predictions = scored.predictions[part]
            path = (
                folder / f"{part or 'validation'}.{'json' if job.task.kind == 'spans' else 'jsonl'}"
            )
            if job.task.kind == "spans":
                # As the official scripts read them.
                ids = examples.rows["id"][:]
                texts = {i: answer.text for i, answer in zip(ids, predictions)}
                write_json(path, texts)
                nulls = folder / f"{part or 'validation'}_null_scores.json"
                write_json(nulls, {i: answer.null_score for i, answer in zip(ids, predictions)})
                written.append(nulls)
            else:
                path.write_text(_lines(examples, predictions, job.data.label_names), "utf-8")
            written.append(path)
        return written

    def _report(self, name: str, role: str, outcome: TaskScore) -> None:
        """The student's metrics carry no role in their name."""
        prefix = f"task/{name}" if role == "student" else f"task/{name}/{role}"
        best = outcome.best
        values = {f"{prefix}/{metric}": value for metric, value in best.mean.items()}
        values |= {f"{prefix}/{metric}_std": value for metric, value in best.spread.items()}
        values[f"{prefix}/num_seeds"] = best.num_seeds
        self.tracker.log_metrics(values)
        if len(outcome.cells) > 1:
            for setting, value in best.settings.items():
                self.tracker.log_metrics({f"{prefix}/best/{setting}": value})
            table = json.dumps([asdict(cell) for cell in outcome.cells], indent=1)
            self.tracker.log_text(table + "\n", f"grids/{name}-{role}.json")


def predictions_folder(
    folder: Path, task: str, role: str, settings: dict[str, Any], seed: int
) -> Path:
    """Where a run keeps what a model predicted: a file for each part.

    Args:
        folder: The run folder.
        task: Its name.
        role: Of the model.
        settings: Those that a search changes, of the cell.
        seed: Of the fine-tuning.
    """
    values = "".join(f"-{value:g}" for value in settings.values())
    return folder / "predictions" / f"{task}-{role}{values}-seed{seed}"


def _role_of_teacher(name: str) -> str:
    """A stage may be called student."""
    return name if name == "teacher" else f"stage-{name}"


@dataclass(frozen=True)
class _Candidate:
    job: Finetuning
    key: str
    value: float


class _Kept:
    """The folder of the model that stays: of the best cell, the seed that validates best.

    A model is first saved in `next_folder`, waits as the best of its cell in another folder, and
    moves to its place when its cell is the best. A file in the folder names the fine-tuning.
    """

    def __init__(self, folder: Path, selected_by: str) -> None:
        self.folder = folder
        self.next_folder = folder.with_name(f"{folder.name}.next")
        self.best: _Candidate | None = None
        self._cell_folder = folder.with_name(f"{folder.name}.cell")
        self._best_of_cell: _Candidate | None = None
        self._selected_by = selected_by
        self._offered: set[str] = set()
        shutil.rmtree(self.next_folder, ignore_errors=True)

    def offer(self, job: Finetuning, key: str, scored: Scored) -> None:
        """Takes a model if it validates better than the others of its cell; else drops it."""
        candidate = _Candidate(job, key, scored.metrics[self._selected_by])
        self._offered.add(key)
        if self._best_of_cell is None or candidate.value > self._best_of_cell.value:
            self._best_of_cell = candidate
            if self.next_folder.is_dir():
                _move(self.next_folder, self._cell_folder, key)
        shutil.rmtree(self.next_folder, ignore_errors=True)

    def copy(self, source: Path, key: str) -> None:
        """Copies the model that another run kept of this fine-tuning, where it still has it."""
        if _key_in(source) == key:
            with contextlib.suppress(OSError):
                shutil.copytree(source, self.next_folder)
        # The other run may have been at work.
        if _key_in(self.next_folder) != key:
            shutil.rmtree(self.next_folder, ignore_errors=True)

    def end_cell(self, is_best: bool) -> None:
        """The models of the next cell compete anew."""
        waiting = _key_in(self._cell_folder)
        if is_best:
            self.best = self._best_of_cell
            if self.best is not None and waiting == self.best.key:
                _move(self._cell_folder, self.folder, self.best.key)
        # Before an interruption it may have been that of a cell which comes later.
        if waiting is None or waiting in self._offered:
            shutil.rmtree(self._cell_folder, ignore_errors=True)
        shutil.rmtree(self.next_folder, ignore_errors=True)
        self._best_of_cell = None
        self._offered.clear()

    def take_again(self) -> None:
        """Takes the model in `next_folder` for the best one."""
        assert self.best is not None
        _move(self.next_folder, self.folder, self.best.key)

    def is_there(self) -> bool:
        """Whether the best one lies in the folder, from now or from before an interruption."""
        return self.best is not None and _key_in(self.folder) == self.best.key

    def close(self) -> None:
        """Drops what waits for nothing."""
        shutil.rmtree(self._cell_folder, ignore_errors=True)


def _key_in(folder: Path) -> str | None:
    try:
        return (folder / "finetuning_key").read_text("utf-8")
    except OSError:
        return None


def _move(source: Path, target: Path, key: str) -> None:
    (source / "finetuning_key").write_text(key, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)


def _searched(settings: TaskSettings, all_settings: list[TaskSettings]) -> dict[str, Any]:
    return {
        name: value
        for name, value in asdict(settings).items()
        if any(getattr(other, name) != value for other in all_settings)
    }


def _average(cell: Cell, scored: list[Scored]) -> None:
    cell.num_seeds = len(scored)
    for metric in scored[0].metrics:
        values = [one.metrics[metric] for one in scored if metric in one.metrics]
        cell.mean[metric] = statistics.fmean(values)
        if len(values) > 1:
            cell.spread[metric] = statistics.stdev(values)


def _key(job: Finetuning, weights: str) -> str:
    definition = asdict(job.task)
    for name in ("data", "train_data", "files"):
        definition.pop(name, None)
    settings = {n: v for n, v in job.settings.as_dict().items() if n not in LIMITS}
    if job.task.kind != "generation":
        definition.pop("target_column", None)
    seed: int | None = job.seed
    if not job.task.is_trained:
        settings, seed = {"max_length": job.settings.max_length}, None  # nothing is trained
    else:
        definition.pop("pooling", None)
    parts = [
        RESULTS_VERSION,
        weights,
        job.name,
        definition,
        {part: examples.fingerprint for part, examples in _read_parts(job)},
        settings,
        seed,
        job.precision,
    ]
    return fingerprint_text(json.dumps(parts, sort_keys=True))


def _read_parts(job: Finetuning) -> Iterable[tuple[str, Examples]]:
    """Every part, as far as it is read."""
    yield "train", job.data.train.at_most(job.settings.max_train_examples)
    yield from _scored_parts(job)


def _scored_parts(job: Finetuning) -> Iterable[tuple[str, Examples]]:
    """Every part with predictions, under their name."""
    limit = job.settings.max_validation_examples
    for part, examples in job.data.validation.items():
        yield part, examples.at_most(limit)
    for part, examples in job.data.test.items():
        yield part_name("test", part), examples.at_most(limit)


def _lines(examples: Examples, predictions: list[Any], names: list[str] | None) -> str:
    lines = []
    for row, prediction in zip(examples.rows, predictions):
        if names is not None:
            row, prediction = row | {"label": names[row["label"]]}, names[prediction]
        lines.append(json.dumps(row | {"prediction": prediction}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _examples(examples: Examples, predictions: list[str]) -> dict[str, list[str]]:
    """Some at even distances, for people to read."""
    number = min(_NUM_EXAMPLES, len(predictions))
    chosen = [index * len(predictions) // number for index in range(number)]
    rows = examples.rows[chosen]
    return {
        "source": rows["source"],
        "target": rows["target"],
        "output": [predictions[index] for index in chosen],
    }


def _read(file: Path, job: Finetuning) -> dict[str, Any] | None:
    """What is stored of a fine-tuning, if it is whole."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        whole = (
            stored["key"] == file.stem
            and isinstance(stored["parent_id"], str)
            and isinstance(stored["run_id"], str)
            and stored["best_epoch"] <= len(stored["epochs"])
            and job.task.selected_by in stored["metrics"]
            and all(
                len(stored["predictions"][part]) == len(examples)
                for part, examples in _scored_parts(job)
            )
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stored if whole else None
