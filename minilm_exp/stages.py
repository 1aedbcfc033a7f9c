"""The stages of a recipe that read the corpus: each distils one model into another."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp import processes
from minilm_exp.corpus import PreparedCorpus, prepare_corpus
from minilm_exp.distil import distil
from minilm_exp.errors import ExperimentError
from minilm_exp.heads import add_masked_lm_head, load_masked_lm, take_from_under_head
from minilm_exp.masking import Masker
from minilm_exp.objective_settings import trains_head
from minilm_exp.objectives import Objective, build_objective
from minilm_exp.plots import loss_curves
from minilm_exp.precision import resolve_precision
from minilm_exp.provenance import (
    RESULTS_VERSION,
    fingerprint_model,
    fingerprint_text,
    fingerprint_tokenizer,
)
from minilm_exp.result import write_json
from minilm_exp.sentence_modules import check_modules
from minilm_exp.settings import Settings, Stage
from minilm_exp.states import QKV, State, StateTap, state_size
from minilm_exp.student import (
    build_student,
    load_checkpoint,
    load_checkpoint_tokenizer,
    untrained_parameters,
)
from minilm_exp.student_folder import save_student
from minilm_exp.teacher import sentence_modules_of
from minilm_exp.teacher_cache import CACHE_VERSION, TeacherCaches, plan_teacher_cache
from minilm_exp.tracking import Tracker
from minilm_exp.vocabulary import count_tokens, match_vocabularies, prune_tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distilled:
    """What the stages on the corpus gave.

    Attributes:
        student: That of the last stage; before its stages on tasks, where there are any.
        undistilled: The same with its first weights.
        tokenizer: Of both; the teacher's, or what was cut down of it.
        untrained: Names of the parameters that no stage of this student reached.
        losses: Validation losses of every stage, by its name.
        models: Encoders and their tokenizers by name: the teacher, the student of each stage, and
            what stages on tasks that name no start begin with.
    """

    student: PreTrainedModel
    undistilled: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    untrained: list[str]
    losses: dict[str, dict[str, float]]
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerFast]]


class Chain:
    """Runs the stages of one run in their order.

    A single stage has its checkpoints and its MLflow history in the run itself. Of several, each
    has a folder below `stages` and a run below the run; a finished one is not repeated when the run
    is resumed. Its student goes to the next stages as it was saved.

    Args:
        settings: The run.
        teacher: Frozen encoder.
        inputs: Fingerprints of the content behind every input, see `run_key`.
        tokenizer: The teacher's.
        folder: The run folder.
        tracker: Of the run.
        grid: Runs for one seed that read the same teacher states, and seeds.
    """

    def __init__(
        self,
        settings: Settings,
        teacher: PreTrainedModel,
        inputs: dict[str, str],
        tokenizer: PreTrainedTokenizerFast,
        folder: Path,
        tracker: Tracker,
        grid: tuple[int, int],
    ) -> None:
        self.settings = settings
        self.teacher, self.inputs, self.folder = teacher, inputs, folder
        # Of the teacher and of each stage's student.
        self._tokenizers = {"teacher": tokenizer}
        self.tracker, self.grid = tracker, grid
        self._corpora: dict[str, PreparedCorpus] = {}
        self._first: dict[str, PreTrainedModel] = {}
        self._untrained: dict[str, set[str]] = {}
        self._is_single = len(settings.chain) == 1

    def run(self) -> Distilled:
        """Runs what is not finished.

        Raises:
            ExperimentError: A stage cannot be run, or its loss is not finite.
        """
        models = {"teacher": self.teacher}
        losses = {}
        for stage in self.settings.corpus_stages:
            models[stage.name], losses[stage.name] = self._run_stage(stage)
        for stage in self.settings.task_stages:
            tokenizer = self._tokenizers[stage.name] = self._tokenizer_of(stage)
            if stage.start is None:
                models[stage.name] = self._build(stage, models[stage.teacher], tokenizer, None)
                self._first[stage.name] = models[stage.name]
            else:
                models[stage.name] = models[stage.start]
        last = self.settings.origin.name
        student, tokenizer = models[last], self._tokenizers[last]
        if last in losses and processes.is_leader():
            modules = self._modules(student, last)
            save_student(student, self.teacher, tokenizer, self.folder / "student", modules)
        return Distilled(
            student,
            self._first[last],
            tokenizer,
            sorted(self._untrained.get(last, ())),
            losses,
            {name: (model, self._tokenizers[name]) for name, model in models.items()},
        )

    def _modules(self, student: PreTrainedModel, last: str) -> Path | None:
        """Of a sentence encoder, which its student keeps if its embeddings were trained too."""
        modules = sentence_modules_of(self.settings.teacher)
        if modules is None:
            return None
        untrained = [name for name in self._untrained[last] if "pooler" not in name]
        if untrained or student.config.hidden_size != self.settings.teacher.hidden_size:
            _log.info(
                "the teacher is a sentence encoder, its student is none: the objective does not"
                " train the last hidden states (recipe=sentence_encoder does)"
            )
            return None
        return modules

    def check(self) -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerFast]]:
        """Makes the objective of every stage on the corpus, before hours go into the first.

        Returns:
            What `Distilled.models` will have, untrained and with the teacher's tokenizer.

        Raises:
            ExperimentError: One of them cannot be made.
        """
        models: dict[str, PreTrainedModel] = {"teacher": self.teacher}
        modules = sentence_modules_of(self.settings.teacher)
        if modules is not None:
            check_modules(modules)  # a student may keep them
        tokenizer = self._tokenizers["teacher"]
        for stage in self.settings.chain:
            settings = stage.settings
            if self.settings.stages:
                for note in settings.notes:
                    _log.info("stage %s: %s", stage.name, note)
            teacher = models[stage.teacher]
            try:
                if stage.start is None:
                    if settings.student.path is not None:
                        models[stage.name], own = load_checkpoint(settings.student.path)
                        match_vocabularies(own, tokenizer)
                    else:
                        models[stage.name] = self._build(stage, teacher, tokenizer, None)
                else:
                    models[stage.name] = models[stage.start]
                if settings.data == "corpus":
                    with_heads, learner, head = _with_heads(settings, teacher, models[stage.name])
                    _check_cache(settings, build_objective(settings, with_heads, learner, head))
                    if head is not None:
                        Masker(tokenizer, settings.seed)
            except ExperimentError as error:
                if not self.settings.stages:
                    raise
                raise ExperimentError(f"recipe.stages.{stage.name}: {error}") from error
        return {name: (model, tokenizer) for name, model in models.items()}

    def _run_stage(self, stage: Stage) -> tuple[PreTrainedModel, dict[str, float]]:
        settings = stage.settings
        teacher, fingerprint = self._teacher_of(stage)
        tokenizer = self._tokenizers[stage.name] = self._tokenizer_of(stage)
        teacher_ids = match_vocabularies(tokenizer, self._tokenizers[stage.teacher])
        student = self._student_of(stage, teacher, tokenizer, teacher_ids)
        teacher_model, learner, head = _with_heads(settings, teacher, student)
        objective = build_objective(settings, teacher_model, learner, head)
        self._note_untrained(stage, student, learner, objective)
        place = self._place(stage.name)
        finished = None if self._is_single else _read(place / "losses.json")
        if finished is not None:
            self._start(stage, place).finish("FINISHED")  # it may have been killed right after
        else:
            corpus = self._corpus_of(stage, tokenizer)
            tracker = self._start(stage, place)
            if not self._is_single:
                folder = str(corpus.folder)
                tracker.log_dataset("corpus", corpus.fingerprint, folder, "training")
            try:
                precision = resolve_precision(settings.training.precision, settings.runtime.device)
                caches = self._caches(
                    stage, corpus, precision, teacher, fingerprint, objective, tracker
                )
                try:
                    finished = distil(
                        settings,
                        teacher_model,
                        learner,
                        objective,
                        tokenizer,
                        corpus,
                        precision,
                        place / "checkpoints",
                        tracker.log_metrics,
                        caches,
                        place / "profile" if settings.profile and processes.is_leader() else None,
                        teacher_ids,
                        None if head is None else Masker(tokenizer, settings.seed),
                    )
                    if head is not None:
                        take_from_under_head(student, learner)
                finally:
                    if caches is not None:
                        caches.close()
                if processes.is_leader():
                    self._record(stage, place, tracker, finished, (student, teacher, tokenizer))
            except BaseException as error:
                if not self._is_single:
                    tracker.fail(error)
                raise
            if not self._is_single:
                tracker.finish("FINISHED")
        if not self._is_single:
            if processes.is_leader():
                shutil.rmtree(place / "checkpoints", ignore_errors=True)
            self.tracker.log_metrics(
                {f"stage/{stage.name}/{name}": value for name, value in finished.items()}
            )
            processes.wait_for_all()
            student = self._load(stage.name)[0]
        return student, finished

    def _record(
        self,
        stage: Stage,
        place: Path,
        tracker: Tracker,
        losses: dict[str, float],
        models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerFast],
    ) -> None:
        """Writes down what a stage gave; its losses last, which tell that it is finished."""
        tracker.log_metrics({f"distill/final/{name}": value for name, value in losses.items()})
        tracker.log_figure(loss_curves(tracker.history, list(losses)), "plots/loss.png")
        if not self._is_single:
            save_student(*models, place / "student")
            write_json(place / "losses.json", losses)
            if stage.settings.profile:
                tracker.log_artifact(place / "profile")

    def _caches(
        self,
        stage: Stage,
        corpus: PreparedCorpus,
        precision: str,
        teacher: PreTrainedModel,
        fingerprint: str,
        objective: Objective,
        tracker: Tracker,
    ) -> TeacherCaches | None:
        _check_cache(stage.settings, objective)
        layer = _cached_layer(objective)
        reason = ""
        if layer is None:
            reason = "off: the objective needs more than query, key and value of one layer"
        if stage.settings.runtime.shard_teacher:
            reason = "off: runtime.shard_teacher=true"
        if layer is None or reason:
            tracker.set_tags({"teacher_cache": reason})
            return None
        grid = self.grid if stage.teacher == "teacher" else (1, 1)
        size = state_size(teacher, State("query", layer))
        return open_caches(
            stage.settings, corpus, precision, fingerprint, layer, size, grid, tracker
        )

    def _load(
        self, name: str, dropout: tuple[float, float] | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The student that a stage left."""
        folder = self._place(name) / "student"
        named = f"the student of stage {name} (remove its folder, and the stage is run again)"
        return load_checkpoint(str(folder), dropout, named, self.settings.teacher.trust_remote_code)

    def _place(self, name: str) -> Path:
        return self.folder if self._is_single else self.folder / "stages" / name

    def _teacher_of(self, stage: Stage) -> tuple[PreTrainedModel, str]:
        if stage.teacher == "teacher":
            return self.teacher, self.inputs["teacher"]
        folder = self._place(stage.teacher) / "student"
        encoder, _ = self._load(stage.teacher)
        return encoder.eval().requires_grad_(False), fingerprint_model(folder)

    def _tokenizer_of(self, stage: Stage) -> PreTrainedTokenizerFast:
        """Of the stage's student."""
        settings = stage.settings
        if stage.start is not None:
            return self._tokenizers[stage.start]
        if settings.student.path is not None:
            return load_checkpoint_tokenizer(settings.student.path)
        place = self._place(stage.name)
        if not self._is_single and _read(place / "losses.json") is not None:
            return self._load(stage.name)[1]
        whole = self._tokenizers[stage.teacher]
        if settings.student.vocabulary == "full":
            return whole
        corpus = self._corpus_of(stage, whole)
        counts = sum(
            count_tokens(part.ids, len(whole)) for part in (corpus.train, corpus.validation)
        )
        assert isinstance(counts, numpy.ndarray)
        tokenizer = prune_tokenizer(whole, counts, settings.student.min_token_count)
        _log.info("student.vocabulary: %d of %d tokens stay", len(tokenizer), len(whole))
        return tokenizer

    def _corpus_of(self, stage: Stage, tokenizer: PreTrainedTokenizerFast) -> PreparedCorpus:
        fingerprint = self.inputs.get(f"corpus.{stage.name}", self.inputs["corpus"])
        return self.open_corpus(stage.settings, tokenizer, fingerprint)

    def open_corpus(
        self, settings: Settings, tokenizer: PreTrainedTokenizerFast, fingerprint: str
    ) -> PreparedCorpus:
        """As the function; the same corpus, which is checked as a whole, is opened once."""
        named = f"{fingerprint} {settings.corpus} {fingerprint_tokenizer(tokenizer)}"
        if named not in self._corpora:
            self._corpora[named] = open_corpus(settings, tokenizer, fingerprint)
        return self._corpora[named]

    def _student_of(
        self,
        stage: Stage,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        teacher_ids: Tensor | None,
    ) -> PreTrainedModel:
        if stage.start is not None:
            training = stage.settings.training
            dropout = (training.hidden_dropout, training.attention_dropout)
            self._first[stage.name] = self._first[stage.start]
            return self._load(stage.start, dropout)[0].train()
        student = self._build(stage, teacher, tokenizer, teacher_ids)
        self._first[stage.name] = copy.deepcopy(student)
        return student

    def _build(
        self,
        stage: Stage,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        teacher_ids: Tensor | None,
    ) -> PreTrainedModel:
        settings = stage.settings
        return build_student(
            settings.student,
            teacher,
            tokenizer,
            settings.layer_selection.teacher_layer,
            (settings.training.hidden_dropout, settings.training.attention_dropout),
            settings.seed,
            teacher_ids,
        )

    def _note_untrained(
        self,
        stage: Stage,
        student: PreTrainedModel,
        learner: PreTrainedModel,
        objective: Objective,
    ) -> None:
        """`learner` is the student, or has it under its head."""
        tap = StateTap(learner, objective.student_states)
        try:
            untrained = set(untrained_parameters(tap))
        finally:
            tap.close()
        if learner is not student:
            prefix = f"{learner.base_model_prefix}."
            # Under each of their names, where weights are tied.
            trained = {name for name, _ in learner.named_parameters(remove_duplicate=False)}
            trained -= untrained
            untrained = {
                name for name, _ in student.named_parameters() if f"{prefix}{name}" not in trained
            }
        if stage.start is not None:
            untrained &= self._untrained[stage.start]
        self._untrained[stage.name] = untrained

    def _start(self, stage: Stage, place: Path) -> Tracker:
        """The stage's run, gone on with where the stage was interrupted."""
        if self._is_single:
            return self.tracker
        tracker = self.tracker.child(f"stage {stage.name}", {"stage": stage.name}, place / "run_id")
        settings = stage.settings
        tracker.log_params(
            {
                "stage": stage.name,
                "teacher": stage.teacher if stage.teacher != "teacher" else settings.teacher.name,
                "start": stage.start or settings.student.init,
                "student": settings.student_name,
                "objective": settings.objective_name,
            }
            | {f"training.{name}": value for name, value in asdict(settings.training).items()}
        )
        return tracker


def open_corpus(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, fingerprint: str
) -> PreparedCorpus:
    """The tokenised corpus of these settings, with a warning where documents were cut."""
    corpus = prepare_corpus(settings, tokenizer, fingerprint)
    if corpus.num_truncated:
        _log.warning(
            "%d documents were cut off at %d tokens",
            corpus.num_truncated,
            settings.corpus.block_length,
        )
    return corpus


def open_caches(
    settings: Settings,
    corpus: PreparedCorpus,
    precision: str,
    teacher_fingerprint: str,
    layer: int,
    hidden_size: int,
    grid: tuple[int, int],
    tracker: Tracker,
) -> TeacherCaches | None:
    """The caches of the states of a teacher layer, or None where they are not wanted."""
    training, runtime = settings.training, settings.runtime
    validation = corpus.validation.spread(training.evaluation_sequences)
    root = settings.outputs / "cache" / "teacher"
    num_cells, num_seeds = grid
    num_epochs = training.max_steps * training.batch_size / len(corpus.train)
    # Below one epoch, each seed reads a share of its own.
    share_read = 1 - (1 - min(1.0, num_epochs)) ** num_seeds
    limit_bytes = runtime.teacher_cache_gb * 1e9
    key = fingerprint_text(
        f"{CACHE_VERSION} {RESULTS_VERSION} {teacher_fingerprint} {corpus.fingerprint} {precision}"
        f" {layer}"
    )
    plan = plan_teacher_cache(
        runtime.teacher_cache,
        precision,
        corpus.train.num_tokens + validation.num_tokens,
        hidden_size,
        num_cells * num_seeds * num_epochs / share_read,
        root,
        key,
        limit_bytes,
    )
    caches, reason = None, plan.reason
    if plan.use:
        lengths = {"train": corpus.train.lengths, "validation": validation.lengths}
        _log.info("teacher cache: %s", reason)
        try:
            caches = TeacherCaches(root, key, lengths, hidden_size, plan, limit_bytes)
            reason += f"; {caches.train.num_cached()} of {len(corpus.train)} examples are there"
        except ExperimentError as error:
            if runtime.teacher_cache == "true":
                raise
            reason = str(error)
    state = "off" if caches is None else "on"
    _log.info("teacher cache %s: %s", state, reason)
    tracker.set_tags({"teacher_cache": f"{state}: {reason}"})
    return caches


def _check_cache(settings: Settings, objective: Objective) -> None:
    if settings.runtime.teacher_cache == "true" and _cached_layer(objective) is None:
        raise ExperimentError(
            "runtime.teacher_cache=true: what can be cached is query, key and value of one teacher"
            f" layer, and objective={settings.objective.name} needs more; set"
            " runtime.teacher_cache=auto"
        )


def _with_heads(
    settings: Settings, teacher: PreTrainedModel, student: PreTrainedModel
) -> tuple[PreTrainedModel, PreTrainedModel, str | None]:
    """Both with heads of masked language modelling, and its name, where the objective needs it."""
    if not trains_head(settings.objective.terms):
        return teacher, student, None
    model = load_masked_lm(settings.teacher, teacher)
    of_teacher = settings.student.init == "teacher_layers"
    return model, add_masked_lm_head(student, model, settings.seed, of_teacher), "masked_lm"


def _cached_layer(objective: Objective) -> int | None:
    """The one teacher layer whose query, key and value are all that is needed, or None.

    With labels the teacher reads masked tokens, other ones each time.
    """
    if objective.reads_labels:
        return None
    layers = {state.layer for state in objective.teacher_states}
    is_qkv = all(state.name in QKV for state in objective.teacher_states)
    return layers.pop() if is_qkv and len(layers) == 1 else None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        losses: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return losses if (file.parent / "student" / "config.json").is_file() else None
