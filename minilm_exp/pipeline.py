"""The whole story of a run: config -> teacher, student -> corpus -> distil -> tasks -> tracking."""

from __future__ import annotations

import logging
import platform
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp import processes
from minilm_exp.checkpoints import signals_ignored
from minilm_exp.claims import claim
from minilm_exp.corpus import PreparedCorpus, fingerprint_corpus, prepare_corpus
from minilm_exp.delivery import Inputs, check_delivery, deliver
from minilm_exp.downstream import Scoring, find_tasks, load_tasks
from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.heads import load_classifier, load_lm_head
from minilm_exp.precision import resolve_precision
from minilm_exp.provenance import (
    RESULTS_VERSION,
    device_name,
    fingerprint_files,
    fingerprint_model,
    fingerprint_text,
    git_state,
    hub_commits,
    run_key,
    versions,
)
from minilm_exp.redaction import redact, redact_all
from minilm_exp.relations import resolve_kernel
from minilm_exp.result import Result, read_result
from minilm_exp.run_folder import (
    choose_folder,
    finished_run,
    run_name,
    standing_runs,
    take_folder,
)
from minilm_exp.settings import NEUTRAL, Settings, as_dict, flatten
from minilm_exp.speed import measure_speedup
from minilm_exp.stages import Chain, open_corpus
from minilm_exp.student import (
    count_parameters,
    load_checkpoint,
)
from minilm_exp.task_stages import Model, TaskStages
from minilm_exp.tasks.examples import TaskData, part_name
from minilm_exp.tasks.splits import Splits
from minilm_exp.teacher import (
    check_baseline,
    fingerprint_teacher,
    load_encoder,
    load_tokenizer,
    random_encoder,
    source_of,
)
from minilm_exp.tracking import (
    SilentTracker,
    Tracker,
    end_interrupted,
    finish_killed,
    start_tracking,
    status_of,
    tag_run,
)
from minilm_exp.trial import Trial

_log = logging.getLogger(__name__)


def run_experiment(
    settings: Settings,
    num_cells: int = 1,
    num_seeds: int = 1,
    trial: Trial | None = None,
    asked: dict[str, Any] | None = None,
) -> Result | PreparedCorpus | None:
    """Runs the recipe, or returns the run with the same key that has already finished.

    Of several processes the first does so, and the others help it to distil and give None.

    Args:
        settings: The run.
        num_cells: Runs of its grid, for one seed, that read the same teacher states.
        num_seeds: Seeds of its grid.
        trial: Its place in a sweep. Where another process computes the same run, it waits then.
        asked: How it was asked for, see `Result.asked`.

    Raises:
        ExperimentError: Something that the user can change stops the run. What was recorded until
            then stays, and the run is marked FAILED.
    """
    if settings.runtime.num_threads is not None:
        torch.set_num_threads(settings.runtime.num_threads)
    if processes.size() > 1:
        processes.meet()
        if not processes.is_leader():
            _follow(settings)
            return None
        _check_processes(settings)
    elif settings.runtime.shard_teacher:
        raise ExperimentError(
            "runtime.shard_teacher=true needs several processes: start run.py with torchrun"
        )
    if settings.recipe.name == "prepare_corpus":
        return prepare_corpus(
            settings, load_tokenizer(settings.teacher), fingerprint_corpus(settings.corpus)
        )
    try:
        precision, inputs, splits = _identify(settings)
    except ExperimentError as error:
        _record_unstarted(settings, error, trial)
        raise
    key = run_key(settings, precision, inputs)
    made_by = _distillation_run(settings)
    studies, seconds = settings.tracking.studies, settings.tracking.retry_seconds
    with claim(settings.outputs, key, studies, trial is not None, seconds):
        finished = finished_run(settings, key)
        if finished is not None and not (settings.rerun or settings.profile):
            _log.info("already finished: %s (rerun=true runs it again)", finished.folder)
            if trial is not None:
                trial.started(finished.run_id)
                tag_run(settings.tracking.uri, finished.run_id, trial.tags)
            finish_killed(
                settings.tracking.uri, finished.run_id, Path(finished.folder) / "result.json"
            )
            _clear(Path(finished.folder))
            processes.tell_followers(None)
            _deliver(settings, Inputs(precision, inputs, splits), finished, trial)
            return finished
        folder, interrupted = choose_folder(settings, key)
        left = take_folder(folder, settings.resume)
        tags = {"run_key": key, "run_folder": str(folder), "host": platform.node()}
        tracker = _start(settings, left, interrupted, made_by, trial, tags)
        result = Result(
            run_id=tracker.run_id,
            run_key=key,
            status="RUNNING",
            folder=str(folder),
            meaningful=(settings.teacher.weights != "random" or "teacher" not in inputs)
            and (made_by is None or made_by.meaningful),
            candidates=settings.candidates,
            replaces=[known.run_id for known in standing_runs(settings, key)],
            asked=asked or {},
        )
        before = left if settings.resume else None
        start = time.monotonic() - ((before and before.elapsed_seconds) or 0)
        try:
            result.write()
            _record_setting(settings, result, precision, inputs, tracker)
            if before is not None and before.made_by.get("git_dirty") == "true":
                result.made_by["git_dirty"] = "true"
            # So that a run which goes on from here knows it, whatever ends this one.
            result.write()
            check_delivery(settings)
            scoring = Scoring(settings, precision, folder, tracker)
            if settings.recipe.name == "finetune":
                _score_checkpoint(settings, inputs, splits, scoring, result)
            else:
                grid = (num_cells, num_seeds)
                _distil_and_score(settings, inputs, splits, grid, scoring, result)
            result.elapsed_seconds = time.monotonic() - start
            _finish(tracker, result)
        except BaseException as error:
            # torchrun, which ends all processes when one has, is not to end the record of it.
            with signals_ignored():
                result.elapsed_seconds = time.monotonic() - start
                reason = _reason_in_others(error)
                if reason is None:
                    _record_failure(tracker, result, error)
                    raise
                failure = ExperimentError(reason)
                _record_failure(tracker, result, failure)
                raise failure from error
        _deliver(settings, Inputs(precision, inputs, splits), result, trial)
    return result


def _deliver(settings: Settings, inputs: Inputs, result: Result, trial: Trial | None) -> None:
    """A trial has its score whether or not what is made of it could be made."""
    try:
        deliver(settings, inputs, result)
    except ExperimentError as error:
        if trial is None:
            raise
        _log.warning("%s is finished, but: %s", result.folder, redact(str(error)))


def _reason_in_others(error: BaseException) -> str | None:
    """Why this process fails, where that may be the end of another one of the run."""
    reason = processes.failure_of_others()
    if reason is None and processes.size() > 1 and isinstance(error, RuntimeError):
        reason = (
            f"{reason_of(error)}: another process of this run has ended, whose reason is in"
            " torchrun's report (signal 9 is often a lack of memory); resume=true goes on"
        )
    return reason


def _check_processes(settings: Settings) -> None:
    """Refuses what several processes cannot do together, before anything is read."""
    if settings.recipe.name in ("finetune", "prepare_corpus") or not settings.corpus_stages:
        raise ExperimentError(
            f"recipe={settings.recipe.name} distils nothing on the corpus, in which"
            f" {processes.size()} processes could help: start run.py without torchrun"
        )
    for stage in settings.corpus_stages:
        processes.share(stage.settings.training.batch_size)


def _follow(settings: Settings) -> None:
    """Takes part in the distillation of the run that the first process records."""
    message = processes.hear_leader()
    if message is None:  # it has finished before
        return
    processes.join(settings.runtime.device)
    chain = Chain(
        settings,
        load_encoder(settings.teacher),
        message["inputs"],
        load_tokenizer(settings.teacher),
        Path(message["folder"]),
        SilentTracker(),
        (message["num_cells"], message["num_seeds"]),
    )
    chain.run()
    processes.leave()


def find_finished(settings: Settings) -> Result | None:
    """The finished run of these settings and the present content of their inputs.

    Raises:
        ExperimentError: An input cannot be had.
    """
    precision, inputs, _ = _identify(settings)
    if settings.rerun:
        return None
    return finished_run(settings, run_key(settings, precision, inputs))


def _identify(settings: Settings) -> tuple[str, dict[str, str], dict[str, Splits]]:
    """Resolved precision, a fingerprint of the content behind every input path, the tasks' data."""
    if settings.runtime.device == "cuda" and not torch.cuda.is_available():
        raise ExperimentError(
            f"runtime.device=cuda, but torch {torch.__version__} sees no CUDA device: use"
            " runtime=cpu, or install a CUDA build of torch"
        )
    check_baseline(settings.baseline)
    resolve_kernel(settings.runtime.relation_kernel, settings.runtime.device)
    precision = resolve_precision(settings.training.precision, settings.runtime.device)
    unread = settings.unread_groups
    inputs = {"student": _fingerprint_student(settings)}
    if "teacher" not in unread:
        inputs["teacher"] = fingerprint_teacher(settings.teacher)
    if "corpus" not in unread:
        inputs["corpus"] = fingerprint_corpus(settings.corpus)
    for stage in settings.stages:
        student = stage.settings.student
        if (student.path, student.config) != (settings.student.path, settings.student.config):
            inputs[f"student.{stage.name}"] = _fingerprint_student(stage.settings)
        if stage.settings.corpus != settings.corpus and stage.settings.data == "corpus":
            inputs[f"corpus.{stage.name}"] = fingerprint_corpus(stage.settings.corpus)
    splits = find_tasks(settings)
    inputs |= {f"task.{name}": found.fingerprint() for name, found in splits.items()}
    return precision, inputs, splits


def _distil_and_score(
    settings: Settings,
    inputs: dict[str, str],
    splits: dict[str, Splits],
    grid: tuple[int, int],
    scoring: Scoring,
    result: Result,
) -> None:
    folder, tracker = scoring.folder, scoring.tracker
    tokenizer = load_tokenizer(settings.teacher)
    teacher = load_encoder(settings.teacher)
    chain = Chain(settings, teacher, inputs, tokenizer, folder, tracker, grid)
    untrained = chain.check()
    corpus = None
    if "corpus" in inputs:
        corpus = chain.open_corpus(settings, tokenizer, inputs["corpus"])
        tracker.log_dataset("corpus", corpus.fingerprint, str(corpus.folder), "training")
    own = Model(teacher, tokenizer, classifier=_own_classifier(settings))
    tasks = _load_tasks(settings, splits, corpus, tracker, own)
    if settings.task_stages:
        scoring.stages = _task_stages(settings, untrained, own)
        scoring.check(tasks)
    processes.tell_followers(
        {"inputs": inputs, "folder": str(folder), "num_cells": grid[0], "num_seeds": grid[1]}
    )
    processes.join(settings.runtime.device)
    distilled = chain.run()
    processes.leave()
    losses = distilled.losses.get(settings.origin.name)
    if losses is not None:
        result.validation_losses, result.validation_loss = losses, losses["total"]
    if len(distilled.losses) > 1:
        result.stages = distilled.losses
    if settings.task_stages:
        scoring.stages = _task_stages(settings, distilled.models, own)

    models = {
        "student": Model(distilled.student, distilled.tokenizer),
        "undistilled": Model(distilled.undistilled, distilled.tokenizer),
        "teacher": replace(own, lm_head=_teacher_lm_head(settings)),
    }
    _measure(settings, models, tracker, result)
    _score(settings, tasks, models, scoring, result)
    result.untrained = distilled.untrained


def _task_stages(
    settings: Settings,
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerFast]],
    teacher: Model,
) -> TaskStages:
    known = {name: Model(*model) for name, model in models.items()}
    return TaskStages(settings, known | {"teacher": teacher})


def _score_checkpoint(
    settings: Settings,
    inputs: dict[str, str],
    splits: dict[str, Splits],
    scoring: Scoring,
    result: Result,
) -> None:
    """Without distilling: the checkpoint of student.path, the teacher, or both."""
    models = {}
    if "student" in settings.recipe.models:
        assert settings.student.path is not None
        path = settings.student.path
        checkpoint = load_checkpoint(path)
        head = load_lm_head(Path(path).expanduser()) if _writes(settings) else {}
        models["student"] = Model(*checkpoint, head)
    if "teacher" in settings.recipe.models:
        encoder, tokenizer = load_encoder(settings.teacher), load_tokenizer(settings.teacher)
        head, classifier = _teacher_lm_head(settings), _own_classifier(settings)
        models["teacher"] = Model(encoder, tokenizer, head, classifier)
    corpus = None
    if "corpus" in inputs:
        tokenizer = next(iter(models.values())).tokenizer
        corpus = open_corpus(settings, tokenizer, inputs["corpus"])
    tasks = _load_tasks(settings, splits, corpus, scoring.tracker, models.get("teacher"))
    _measure(settings, models, scoring.tracker, result)
    _score(settings, tasks, models, scoring, result)


def _writes(settings: Settings) -> bool:
    return any(task.kind == "generation" for task in settings.tasks.values())


def _own_classifier(settings: Settings) -> PreTrainedModel | None:
    return load_classifier(settings.teacher) if settings.teacher.head == "own" else None


def _teacher_lm_head(settings: Settings) -> dict[str, Tensor]:
    if not _writes(settings) or settings.teacher.weights == "random":
        return {}
    return load_lm_head(*source_of(settings.teacher))


def _score(
    settings: Settings,
    tasks: dict[str, TaskData],
    models: dict[str, Model],
    scoring: Scoring,
    result: Result,
) -> None:
    """Fine-tunes the models on each task; what is finished is written down at once."""
    result.num_seeds = settings.task_training.num_seeds if tasks else None
    for name, data in tasks.items():
        for role in settings.recipe.models:
            outcome = scoring.score(name, data, role, models[role])
            best = outcome.best
            result.scores_of(role)[name] = best.mean[settings.tasks[name].score]
            result.metrics.setdefault(role, {})[name] = best.mean
            if best.spread:
                result.spreads.setdefault(role, {})[name] = best.spread
            if len(outcome.cells) > 1:
                cells = [asdict(cell) for cell in outcome.cells]
                result.grids.setdefault(role, {})[name] = cells
            result.write()


def _load_tasks(
    settings: Settings,
    splits: dict[str, Splits],
    corpus: PreparedCorpus | None,
    tracker: Tracker,
    teacher: Model | None,
) -> dict[str, TaskData]:
    documents = [] if corpus is None else corpus.held_out_documents()
    has_own_head = teacher is not None and teacher.classifier is not None
    tasks = load_tasks(settings, splits, documents, teacher if has_own_head else None)
    for name, data in tasks.items():
        source = str(splits[name].train if name in splits else corpus and corpus.folder)
        tracker.log_dataset(name, fingerprint_text(data.fingerprint), source, "evaluation")
        sizes = {"train": data.train} | {
            part_name("validation", part): part_data for part, part_data in data.validation.items()
        }
        # No metrics, of which the page that compares runs would draw the first.
        tracker.set_tags(
            {f"task/{name}/num_{part}": str(len(examples)) for part, examples in sizes.items()}
        )
    return tasks


def _measure(
    settings: Settings, models: dict[str, Model], tracker: Tracker, result: Result
) -> None:
    """Sizes of the models, and the speed of the student beside the baseline."""
    counts = {
        role: count_parameters(model.encoder)
        for role, model in models.items()
        if role != "undistilled"
    }
    baseline = settings.baseline
    measured = models["student" if "student" in models else "teacher"].encoder
    if baseline.name != "teacher":
        other = random_encoder(baseline, None)
        counts["baseline"] = count_parameters(other)
    elif "teacher" in models and "student" in models:
        other = models["teacher"].encoder
    else:
        other = None
    if other is not None:
        result.baseline = settings.teacher.name if baseline.name == "teacher" else baseline.name
        result.speedup = measure_speedup(
            other, measured, baseline.num_batches, baseline.batch_size, settings.runtime.device
        )
        tracker.log_metrics({"model/speedup": result.speedup})
        tracker.set_tags({"baseline": result.baseline})
    result.parameters = {role: asdict(count) for role, count in counts.items()}
    own = counts.get("student", counts.get("teacher"))
    assert own is not None
    tracker.log_metrics(
        {
            "model/params": own.total,
            "model/params_embedding": own.embedding,
            "model/params_transformer": own.transformer,
        }
    )


def _start(
    settings: Settings,
    left: Result | None,
    interrupted: list[str],
    made_by: Result | None,
    trial: Trial | None,
    tags: dict[str, str],
) -> Tracker:
    """Below the run of the sweep, or that which made the checkpoint.

    A process that was killed at once may have begun a run with these tags and no result; it goes
    on.
    """
    parent_id = made_by.run_id if made_by is not None else None
    run_id = left.run_id if left is not None and settings.resume else None
    tracker = start_tracking(
        settings.tracking.uri,
        settings.tracking.experiment,
        settings.outputs,
        run_name(settings),
        run_id,
        trial.parent_id if trial is not None else parent_id,
        tags | (trial.tags if trial is not None else {}),
        # One process at a time may have them.
        tags if tags and left is None else None,
        settings.tracking.retry_seconds,
        is_known=trial is not None,
    )
    if trial is not None:
        trial.started(tracker.run_id)
    for run_id in interrupted:
        if run_id != tracker.run_id:
            end_interrupted(settings.tracking.uri, run_id)
    return tracker


def _distillation_run(settings: Settings) -> Result | None:
    """Of the run that made the checkpoint which is only fine-tuned here."""
    if settings.recipe.name != "finetune" or settings.student.path is None:
        return None
    folder = Path(settings.student.path).expanduser().absolute().parent
    if folder.parent.name == "stages":
        folder = folder.parents[1]
    return read_result(folder)


def _record_unstarted(settings: Settings, error: ExperimentError, trial: Trial | None) -> None:
    """A run that failed before anything could be computed is in MLflow too."""
    try:
        tracker = _start(settings, None, [], _distillation_run(settings), trial, {})
        tracker.log_params(_params(settings))
        tracker.set_tags({"error": str(error), "seed": str(settings.seed)})
        tracker.finish("FAILED")
    except Exception as also:
        _log.warning("the failure could not be recorded: %s", redact(str(also))[:300])


def _params(settings: Settings) -> dict[str, Any]:
    """What tells runs apart, by short names for the columns of the UI, then every setting."""
    short: dict[str, Any] = {"tasks": ",".join(settings.tasks), "recipe": settings.recipe.name}
    if settings.recipe.name != "finetune":
        short |= {
            "teacher": settings.teacher.name,
            "student": settings.student_name,
        }
        if "layer_selection" not in settings.unread_groups:
            short["teacher_layer"] = settings.layer_selection.teacher_layer
        if settings.objective.reads_relation_set:
            short |= {
                "relations": settings.relation_set.name,
                "num_relation_heads": settings.relation_set.num_relation_heads,
            }
    left_out = {*NEUTRAL, *settings.unread_groups}
    # Each fine-tuning is a run that names its own settings.
    families = ("task_training.families.", "task_training.exceptions.")
    return short | {
        name: value
        for name, value in flatten(settings).items()
        if name.split(".")[0] not in left_out and not name.startswith(families)
    }


def _record_setting(
    settings: Settings,
    result: Result,
    precision: str,
    inputs: dict[str, str],
    tracker: Tracker,
) -> None:
    """Params, tags and config of the run, before anything is computed."""
    config_file = Path(result.folder) / "config.yaml"
    plain = redact_all(as_dict(settings))
    config_file.write_text(redact(yaml.safe_dump(plain, sort_keys=False)), "utf-8")
    tracker.log_params(_params(settings) | {"precision": precision})
    git = git_state()
    result.made_by = {
        "git_commit": git["commit"],
        "git_dirty": git["dirty"],
        "results_version": str(RESULTS_VERSION),
        "precision": precision,
        "device": device_name(settings.runtime.device),
        "threads": str(torch.get_num_threads()),
        **{f"input.{name}": fingerprint for name, fingerprint in inputs.items()},
        **hub_commits(settings),
    }
    if settings.teacher.trust_remote_code and "teacher" in inputs:
        result.made_by["trust_remote_code"] = "true"
    tracker.set_tags(
        {
            "seed": str(settings.seed),
            **{name: value for name, value in result.made_by.items() if name != "precision"},
            "meaningful": str(result.meaningful).lower(),
            **{f"version.{name}": version for name, version in versions().items()},
        }
    )
    if settings.candidates:
        names = settings.candidates[0]
        columns = {name: [str(row[name]) for row in settings.candidates] for name in names}
        tracker.log_table(columns, "student_shapes.json")
    if git["diff"]:
        tracker.log_text(git["diff"], "git.diff")
    tracker.log_artifact(config_file)
    for note in settings.notes:
        _log.info(note)
    if not result.meaningful:
        _log.warning("a random teacher: the result of this run is not meaningful")


def _finish(tracker: Tracker, result: Result) -> None:
    folder = Path(result.folder)
    if result.score is not None:
        tracker.log_metrics({"score": result.score})
    if (folder / "student").is_dir():
        tracker.log_artifact(folder / "student")
        result.student_fingerprint = fingerprint_model(folder / "student")
    if (folder / "profile").is_dir():
        tracker.log_artifact(folder / "profile")
    result.status = "FINISHED"
    result.write()
    tracker.log_artifact(folder / "result.json")
    tracker.finish("FINISHED")
    _clear(folder)


def _clear(folder: Path) -> None:
    """Removes what only a run that goes on needs."""
    for name in ("checkpoints", "finetuning"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _record_failure(tracker: Tracker, result: Result, error: BaseException) -> None:
    """Best effort: a full disk or a lost server must not hide the error itself."""
    result.status = status_of(error)
    result.error = redact(f"{type(error).__name__}: {error}")
    try:
        result.write()
    except Exception as also:
        _log.warning("the failure could not be recorded: %s", redact(str(also))[:300])
    tracker.fail(error)


def _fingerprint_student(settings: Settings) -> str:
    if settings.student.path is not None:
        return fingerprint_model(Path(settings.student.path).expanduser())
    if settings.student.config is not None:
        return fingerprint_files([Path(settings.student.config).expanduser()])
    return ""
