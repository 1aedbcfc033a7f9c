"""The student's shape by budget: candidates are timed untrained, here, beside the teacher."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Container
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from filelock import FileLock
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from minilm_exp import processes
from minilm_exp.budget import TARGETS, Candidate, Shape, has_budget, ranked, shapes, table_row
from minilm_exp.corpus import fingerprint_corpus, prepare_corpus
from minilm_exp.errors import ExperimentError
from minilm_exp.objective_settings import StateTerm
from minilm_exp.parsing import fitting_heads, parse
from minilm_exp.provenance import device_name, fingerprint_text, versions
from minilm_exp.result import write_json
from minilm_exp.settings import Budget, Settings, Teacher, max_tokens
from minilm_exp.speed import draw_batch, seconds_of
from minilm_exp.student import build_student, count_parameters
from minilm_exp.teacher import load_encoder, load_tokenizer, source_of
from minilm_exp.teacher_facts import read_config
from minilm_exp.vocabulary import count_tokens, prune_tokenizer

_log = logging.getLogger(__name__)
# What a batch has where a latency is asked for and nothing else is said.
_LATENCY_BATCH, _LATENCY_LENGTH = 1, 128
# Rounds in which every model reads the same batch: as many as fit in a minute, of these numbers.
_FEWEST_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 21, 60.0
# Where nothing is decided by time.
_UNTIMED_ROUNDS = 2
_MOST_TOKENS = 2**20
_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size")


def settings_of(
    config: DictConfig,
    teacher_was_chosen: bool = True,
    typed: Container[str] = frozenset(),
    width: int | None = None,
) -> Settings:
    """The typed settings of one run, whose student a budget may choose.

    What was measured is kept in outputs/budgets by all that it hangs on, this machine with it, so
    that a repeated command has the same student, whatever else the machine is at.

    Args:
        config: As for `parse`, and so are the next two.
        teacher_was_chosen: See there.
        typed: See there.
        width: Hidden size of the student, of those that meet the budget.

    Raises:
        ExperimentError: A setting is wrong, or no shape meets the budget.
    """
    if not has_budget(config):
        return parse(config, teacher_was_chosen, typed)
    _refuse_shape(config, typed)
    if processes.size() > 1:
        raise ExperimentError(
            "student.budget: several processes would time each other; run once without torchrun,"
            " with recipe=prepare_corpus for example, and give the shape that it names"
        )
    own = {name: f"${{teacher.{name}}}" for name in _SHAPE}
    whole = parse(_with_student(config, own), teacher_was_chosen, typed)
    budget = whole.student.budget
    candidates = shapes(whole.teacher, budget, _needs_same_width(whole))
    measured = _measured(whole, candidates)
    fitting = ranked(measured, budget)
    refused = []
    for chosen in fitting:
        if width not in (None, chosen.shape.hidden_size):
            continue
        given = _with_student(config, _values(chosen.shape))
        _adapt_heads(given, whole, chosen.shape, typed)
        try:
            settings = parse(given, teacher_was_chosen, typed)
        except ExperimentError as error:
            refused.append(f"{chosen.shape.name}: {error}")
            continue
        settings.candidates = [table_row(candidate, budget, chosen) for candidate in measured]
        settings.notes[:0] = _reasons(settings, chosen, fitting, refused)
        return settings
    raise ExperimentError(
        "student.budget: the settings refuse every shape that meets it; the first, "
        + "; ".join(refused[:1])
    )


def print_candidates(settings: Settings) -> None:
    """The shapes that were measured, and which one was taken."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("layers x hidden", "heads", "params", "ms a batch", "speedup", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in settings.candidates:
        state = "chosen" if row["chosen"] else "meets the budget" * row["meets_budget"]
        table.add_row(
            f"{row['num_layers']} x {row['hidden_size']}",
            str(row["num_attention_heads"]),
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['milliseconds']:.2f}",
            f"x{row['speedup']:.2f}",
            state,
        )
    console = Console(markup=False)
    console.print("\nshapes that were measured, untrained")
    console.print(table)
    console.print()


def _refuse_shape(config: DictConfig, typed: Container[str]) -> None:
    names = [f"student.{name}" for name in (*_SHAPE, "embedding_size", "init_layers")]
    if config.student.get("num_layers") is not None:
        names.append("student")
    given = [name for name in names if name in typed]
    given += [f"student.{name}" for name in ("path", "config") if config.student.get(name)]
    if given:
        raise ExperimentError(
            f"{given[0]} and student.budget are given: the budget chooses the student; leave out"
            " one of them"
        )


def _with_student(config: DictConfig, values: dict[str, Any]) -> DictConfig:
    given = config.copy()
    with open_dict(given):
        given.student.update(values)
    return given


def _values(shape: Shape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in _SHAPE}


def _adapt_heads(config: DictConfig, whole: Settings, shape: Shape, typed: Container[str]) -> None:
    """Where the teacher's number of relation heads does not divide the student's hidden size."""
    if "teacher.num_relation_heads" in typed:
        return
    teacher = whole.teacher
    heads = fitting_heads(teacher.num_relation_heads, teacher.hidden_size, shape.hidden_size)
    with open_dict(config):
        config.teacher.num_relation_heads = heads


def _needs_same_width(settings: Settings) -> bool:
    """Whether states of equal size are compared."""
    return any(
        isinstance(term, StateTerm) and term.projection == "none"
        for stage in settings.chain
        for term in stage.settings.objective.terms.values()
    )


def _reasons(
    settings: Settings, chosen: Candidate, fitting: list[Candidate], refused: list[str]
) -> list[str]:
    budget, student = settings.student.budget, settings.student
    asked = ", ".join(
        f"{name}={getattr(budget, name)}" for name in TARGETS if getattr(budget, name) is not None
    )
    notes = [
        f"student.budget ({asked}): {chosen.shape.name} with {chosen.shape.num_attention_heads}"
        f" heads, the largest of {len(fitting)} shapes that meet it: x{chosen.speedup:.2f},"
        f" {chosen.parameters / 1e6:.2f}M parameters, {chosen.milliseconds:.2f} ms a batch; the"
        f" same without measuring: student.num_layers={student.num_layers}"
        f" student.hidden_size={student.hidden_size}"
        f" student.num_attention_heads={student.num_attention_heads}"
        f" student.intermediate_size={student.intermediate_size or 'null'}"
    ]
    notes += [f"student.budget: not taken, {reason}" for reason in refused]
    width = settings.teacher.hidden_size
    wide = [candidate for candidate in fitting if candidate.shape.hidden_size == width]
    if student.hidden_size != width and wide:
        notes.append(
            f"student.budget: {chosen.shape.name} starts from random weights, which takes many"
            f" steps (the papers: 400,000); {wide[0].shape.name} meets the budget too and starts"
            f" from the teacher's layers: student.budget.hidden_sizes=[{width}]"
        )
    training = settings.training
    if settings.corpus_stages:
        notes.append(
            f"training.learning_rate={training.learning_rate:g}: MiniLMv2 has 0.0006 for all of its"
            f" students (section 4.1), with batches of 256 sequences; here {training.batch_size}"
        )
    return notes


def _measured(settings: Settings, candidates: list[Shape]) -> list[Candidate]:
    """From outputs/budgets where it has been measured here before."""
    budget = settings.student.budget
    threads = budget.threads or settings.runtime.num_threads or torch.get_num_threads()
    num_tokens = _num_tokens(settings)
    hangs_on = [
        _facts(settings.teacher),
        [asdict(shape) for shape in candidates],
        _batch_form(settings),
        _is_timed(budget),
        num_tokens,
        threads,
        settings.runtime.device,
        device_name(settings.runtime.device),
        versions(),
    ]
    key = fingerprint_text(json.dumps(hangs_on, sort_keys=True, default=str))
    file = settings.outputs / "budgets" / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        stored = None if budget.remeasure else _read(file)
        if stored is not None:
            _log.info(
                "student.budget: measured before on this machine (%s;"
                " student.budget.remeasure=true measures again)",
                file,
            )
            return stored
        teacher = load_encoder(settings.teacher)
        measured = _measure(settings, teacher, candidates, num_tokens, threads)
        write_json(file, [asdict(candidate) for candidate in measured])
    return measured


def _is_timed(budget: Budget) -> bool:
    return budget.speedup is not None or budget.latency_ms is not None


def _facts(teacher: Teacher) -> dict[str, Any]:
    """All that shapes it; its weights make no difference to its speed."""
    if teacher.weights == "random":
        return asdict(teacher) | {"name": None}
    source, revision = source_of(teacher)
    config = read_config(str(source), revision)
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def _read(file: Path) -> list[Candidate] | None:
    try:
        return [Candidate.of(one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _num_tokens(settings: Settings) -> int | None:
    """How many tokens a student of a cut vocabulary has."""
    if settings.student.vocabulary == "full":
        return None
    tokenizer = load_tokenizer(settings.teacher)
    corpus = prepare_corpus(settings, tokenizer, fingerprint_corpus(settings.corpus))
    counts = count_tokens(corpus.train.ids, len(tokenizer)) + count_tokens(
        corpus.validation.ids, len(tokenizer)
    )
    return len(prune_tokenizer(tokenizer, counts, settings.student.min_token_count))


def _batch_form(settings: Settings) -> tuple[int, int | None]:
    """Sequences of the batch that is timed, and tokens of each; None for QNLI's lengths.

    Raises:
        ExperimentError: They are longer than the models can read.
    """
    budget = settings.student.budget
    is_latency = budget.latency_ms is not None
    batch_size = budget.batch_size or (_LATENCY_BATCH if is_latency else None)
    length = budget.sequence_length or (_LATENCY_LENGTH if is_latency else None)
    most = settings.teacher.max_tokens
    if length is not None and length > most:
        if budget.sequence_length is not None:
            raise ExperimentError(
                f"student.budget.sequence_length={length} is above the teacher's {most} positions"
            )
        length = most
    batch_size = batch_size or settings.baseline.batch_size
    if batch_size * (length or most) > _MOST_TOKENS:
        raise ExperimentError(
            f"student.budget.batch_size={batch_size} with sequences of {length or most} tokens: a"
            f" batch of more than {_MOST_TOKENS} tokens is not timed"
        )
    return batch_size, length


@torch.inference_mode()
def _measure(
    settings: Settings,
    teacher: PreTrainedModel,
    candidates: list[Shape],
    num_tokens: int | None,
    threads: int,
) -> list[Candidate]:
    """Teacher and candidates read each batch in turn."""
    device = settings.runtime.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ExperimentError("runtime.device=cuda, but torch sees no CUDA device: runtime=cpu")
    models = _build(settings, teacher, candidates, num_tokens)
    counts = [count_parameters(model) for model in models]
    everyone = [one.eval().to(device) for one in (teacher, *models)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = _rounds(settings, everyone)
    finally:
        torch.set_num_threads(before)
    own, others = seconds[0], seconds[1:]
    return [
        Candidate(
            shape,
            count.total,
            count.transformer,
            1000 * statistics.median(times),
            statistics.median(a / b for a, b in zip(own, times)),
        )
        for shape, count, times in zip(candidates, counts, others)
    ]


def _rounds(settings: Settings, models: list[PreTrainedModel]) -> list[list[float]]:
    """Seconds of each model in each round, after one that does not count."""
    batch_size, length = _batch_form(settings)
    config = models[0].config
    longest = max_tokens(config.model_type, config.max_position_embeddings)
    vocab_size = min(model.config.vocab_size for model in models)
    draw = numpy.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in models]
    number, done = _MOST_ROUNDS, 0
    with tqdm(total=number, desc=f"time {len(models) - 1} shapes", unit="round") as bar:
        while done <= number:
            batch = draw_batch(
                draw, batch_size, vocab_size, longest, settings.runtime.device, length
            )
            took = [seconds_of(model, batch) for model in models]
            if done:
                bar.update()
                for times, one in zip(seconds, took):
                    times.append(one)
            else:
                fitting = int(_SECONDS / sum(took))
                number = min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, fitting))
                if not _is_timed(settings.student.budget):
                    number = _UNTIMED_ROUNDS
                bar.total = number
            done += 1
    return seconds


def _build(
    settings: Settings,
    teacher: PreTrainedModel,
    candidates: list[Shape],
    num_tokens: int | None,
) -> list[PreTrainedModel]:
    """Untrained; those of one width share their weights, so that all fit in memory."""
    tokenizer = load_tokenizer(settings.teacher)
    ids = None if num_tokens is None else torch.arange(num_tokens)
    deepest: dict[int, dict[str, Tensor]] = {}
    models = []
    for shape in candidates:  # of one width the deepest comes first
        student = replace(
            settings.student, **_values(shape), init="random", budget=Budget(), path=None
        )
        layer = settings.layer_selection.teacher_layer
        model = build_student(student, teacher, tokenizer, layer, (0.0, 0.0), 0, ids)
        own = model.state_dict()
        shared = deepest.setdefault(shape.hidden_size, own)
        if shared is not own:
            model.load_state_dict({name: shared[name] for name in own}, assign=True)
        models.append(model)
    return models
