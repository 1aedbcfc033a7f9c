"""The exports of a finished run, made where they are missing and measured side by side."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp.corpus import PreparedCorpus
from minilm_exp.downstream import job_of, load_tasks
from minilm_exp.export import ExportGraph, export_model
from minilm_exp.export_comparison import (
    Measured,
    compare,
    corpus_rows,
    largest_differences,
    megabytes_of,
    task_rows,
)
from minilm_exp.exported import GRAPHS, load_exported
from minilm_exp.heads import load_classifier
from minilm_exp.provenance import fingerprint_files
from minilm_exp.result import Result
from minilm_exp.sentence_modules import Pooling, read_pooling
from minilm_exp.settings import EXPORTS, Settings
from minilm_exp.stages import open_corpus
from minilm_exp.student import load_checkpoint, load_checkpoint_tokenizer
from minilm_exp.task_stages import Model
from minilm_exp.tasks.finetune import Finetuning, load_finetuned, score_finetuned, with_head
from minilm_exp.tasks.similarity import score_similarity
from minilm_exp.tasks.splits import Splits
from minilm_exp.teacher import load_encoder, load_tokenizer
from minilm_exp.tracking import Tracker

_log = logging.getLogger(__name__)
_ENCODER = "student"


def make_exports(
    settings: Settings,
    fingerprints: dict[str, str],
    splits: dict[str, Splits],
    result: Result,
    tracker: Tracker | None,
) -> None:
    """Exports the run's encoder and the models of its tasks that were kept.

    What lies whole in exports/ is not made again. All exports of a model are measured anew with
    each that is added, because times compare within one run of them only.

    Args:
        settings: The run.
        fingerprints: Of what it read.
        splits: Where the data of its tasks are.
        result: Of the run; takes what was measured and is written.
        tracker: Of the run.

    Raises:
        ExperimentError: An architecture cannot be exported.
    """
    for name, source in _sources(settings, Path(result.folder)):
        known = result.exports.get(name, {}).get("fingerprints", {})
        folder = Path(result.folder) / "exports" / name
        present = {one: _fingerprint(folder / one) for one in known}
        whole = [one for one in known if present[one] == known[one]]
        missing = [one for one in settings.export if one not in whole]
        if not missing:
            continue
        exporting = _Exporting(settings, fingerprints, splits, name, source, folder)
        for one in missing:
            _log.info("export: %s as %s", name, one)
            exporting.write(one)
        chosen = [one for one in EXPORTS if one in missing or one in whole]
        result.exports[name] = exporting.measure(chosen) | {
            "fingerprints": {one: _fingerprint(folder / one) for one in chosen}
        }
        result.write()
        if tracker is not None:
            _record(tracker, name, result.exports[name]["models"])
            for one in missing:
                tracker.log_artifact(folder / one, f"exports/{name}/{one}")


def _sources(settings: Settings, folder: Path) -> Iterator[tuple[str, Path]]:
    """The models that can be exported, by the name of their exports."""
    if (folder / "student").is_dir():
        yield _ENCODER, folder / "student"
    for name, task in settings.tasks.items():
        model = folder / "models" / f"{name}-student"
        if model.is_dir() and settings.recipe.keep_models:
            if task.kind == "generation":
                _log.info("export: the model of %s writes, and is not exported", name)
            else:
                yield name, model


def _fingerprint(folder: Path) -> str:
    return fingerprint_files(sorted(path for path in folder.glob("*") if path.is_file()), True)


def _record(tracker: Tracker, name: str, models: dict[str, dict[str, Any]]) -> None:
    for model, measured in models.items():
        prefix = f"export/{model}" if name == _ENCODER else f"export/{model}/{name}"
        values = {"megabytes": measured["megabytes"]}
        for kind in ("milliseconds", "speedup"):
            values |= {f"{kind}_batch_{size}": one for size, one in measured[kind].items()}
        values |= {f"difference/{output}": one for output, one in measured["differences"].items()}
        for task, metrics in measured["scores"].items():
            values |= {f"{task}/{metric}": one for metric, one in metrics.items()}
        step = len(tracker.history(f"{prefix}/megabytes"))
        tracker.log_metrics({f"{prefix}/{key}": one for key, one in values.items()}, step)


@dataclass
class _Exporting:
    """Exports one model of a run; all is done on the CPU."""

    given: Settings
    fingerprints: dict[str, str]
    splits: dict[str, Splits]
    name: str
    source: Path
    folder: Path

    @functools.cached_property
    def settings(self) -> Settings:
        """The run's, on the CPU."""
        return replace(self.given, runtime=replace(self.given.runtime, device="cpu"))

    @functools.cached_property
    def _task(self) -> Any:
        return None if self.name == _ENCODER else self.settings.tasks[self.name]

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        trusts_code = self.settings.teacher.trust_remote_code
        if self._task is None:
            return load_checkpoint(str(self.source), None, "export", trusts_code)
        tokenizer = load_checkpoint_tokenizer(str(self.source), "export")
        return load_finetuned(self.source, self._task.kind), tokenizer

    @functools.cached_property
    def _pooling(self) -> Pooling | None:
        return read_pooling(self.source) if self._task is None else None

    def write(self, export: str) -> None:
        """Makes one."""
        model, tokenizer = self._loaded
        graph = ExportGraph(model, tokenizer, self._pooling)
        export_model(graph, tokenizer, export, self.folder / export)

    def measure(self, exports: list[str]) -> dict[str, Any]:
        """Of teacher, student and exports, see `Measured`."""
        model, tokenizer = self._loaded
        models: dict[str, nn.Module] = {}
        if "teacher" in self.fingerprints:
            models["teacher"] = self._teacher()
        models["student"] = model.eval()
        measured = {role: Measured(megabytes_of(one)) for role, one in models.items()}
        measured["student"].scores = self._scores(model)
        rows = self._rows()
        for name in exports:
            exported = load_exported(self.folder / name, model.config)
            size = sum(file.stat().st_size for file in self.folder.glob(f"{name}/{GRAPHS[name]}*"))
            measured[name] = Measured(
                size / 1e6,
                differences=largest_differences(model, exported, rows, tokenizer, self._pooling),
                scores=self._scores(exported),
            )
            models[name] = exported
        baseline = self.settings.baseline
        sizes = sorted({1, baseline.batch_size})
        compare(measured, models, sizes, baseline.num_batches)
        return {
            "threads": torch.get_num_threads(),
            "models": {name: asdict(one) for name, one in measured.items()},
        }

    def _teacher(self) -> PreTrainedModel:
        """Under a head of the task too, whose weights make no difference to its speed."""
        teacher = load_encoder(self.settings.teacher)
        return (teacher if self._task is None else with_head(teacher, self._jobs[self.name])).eval()

    def _rows(self) -> Dataset:
        tokenizer = self._loaded[1]
        if self._task is not None:
            return task_rows(self._jobs[self.name], tokenizer)
        return corpus_rows(self._corpus(tokenizer).validation, tokenizer)

    def _corpus(self, tokenizer: PreTrainedTokenizerFast) -> PreparedCorpus:
        """That of the stage which made the student."""
        origin = self.settings.origin
        fingerprint = self.fingerprints.get(f"corpus.{origin.name}", self.fingerprints["corpus"])
        return open_corpus(origin.settings, tokenizer, fingerprint)

    @functools.cached_property
    def _jobs(self) -> dict[str, Finetuning]:
        """Of the tasks that this model can be scored on as it is."""
        tasks = self.settings.tasks
        names = [self.name] if self._task is not None else []
        names = names or [name for name, task in tasks.items() if task.kind == "similarity"]
        settings = replace(self.settings, tasks={name: tasks[name] for name in names})
        reads_teacher = "teacher" in self.fingerprints
        tokenizer = load_tokenizer(settings.teacher) if reads_teacher else self._loaded[1]
        documents = []
        if settings.has_task_of_corpus:
            corpus = open_corpus(settings, tokenizer, self.fingerprints["corpus"])
            documents = corpus.held_out_documents()
        teacher = None
        if settings.teacher.head == "own" and settings.tasks and reads_teacher:
            classifier = load_classifier(settings.teacher)
            teacher = Model(classifier, tokenizer, classifier=classifier)
        jobs = {}
        for name, data in load_tasks(settings, self.splits, documents, teacher).items():
            # A search varies nothing that scoring reads.
            cell = settings.task_training.cells(name, tasks[name])[0]
            jobs[name] = job_of(settings, "fp32", name, data, cell, settings.seed)
        return jobs

    def _scores(self, model: nn.Module) -> dict[str, dict[str, float]]:
        tokenizer = self._loaded[1]
        if self._task is not None:
            return {self.name: score_finetuned(model, tokenizer, self._jobs[self.name])}
        return {
            name: score_similarity(model, tokenizer, job).metrics
            for name, job in self._jobs.items()
        }
