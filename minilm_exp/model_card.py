"""The model card of a student, as the hub reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from minilm_exp.licences import Licence, licence_of_teacher, of_hub
from minilm_exp.objective_settings import (
    AnyTerm,
    LabelTerm,
    LogitTerm,
    RelationTerm,
    StateTerm,
)
from minilm_exp.provenance import fingerprint_text
from minilm_exp.redaction import redact, redact_all
from minilm_exp.result import Result
from minilm_exp.settings import NEUTRAL, Corpus, Settings, as_dict
from minilm_exp.task_settings import TeacherLabels
from minilm_exp.teacher_facts import is_there


def write_model_card(folder: Path, settings: Settings, result: Result, task: str | None) -> None:
    """README.md of a checkpoint: what it is, every measured number, data and licences, the config.

    Args:
        folder: The checkpoint.
        settings: Of the run that made it.
        result: What that measured.
        task: On which the student was fine-tuned; None of an encoder.
    """
    licence = licence_of_teacher(settings.teacher)
    front = yaml.safe_dump(
        redact_all(_front_matter(folder, settings, licence, task)),
        sort_keys=False,
        allow_unicode=True,
    )
    name = f"{settings.student_name} distilled from {settings.teacher.name}"
    parts = [
        f"# {_plain(name)}" + (f", fine-tuned on {_plain(task)}" if task else ""),
        "" if result.meaningful else "**Not meaningful: the teacher had random weights.**",
        _about(settings, result, licence),
        "## Measured",
        _table(["measured", "value"], _sizes(settings, result)),
        _table(["validation loss", "value"], _losses(result)),
        _table(["task", "metric", *_ROLES.values()], _scores(settings, result)),
        _exports(result),
        _mark(result) if result.exports else "",
        _warning(result.untrained if task is None else []),
        "## Use",
        _use(folder, settings, task),
        "## Config",
        _fenced(_config(settings), "yaml"),
    ]
    text = "\n\n".join(part.strip("\n") for part in parts if part)
    (folder / "README.md").write_text(f"---\n{front}---\n\n{redact(text)}\n", encoding="utf-8")


def is_card_of(folder: Path, result: Result) -> bool:
    """Whether a model card lies there, of this run and with its exports."""
    try:
        text = (folder / "README.md").read_text("utf-8")
    except (OSError, ValueError):
        return False
    has_exports = not result.exports or _mark(result) in text
    return f"run key: {result.run_key}" in text and has_exports


def _mark(result: Result) -> str:
    """Tells which exports the card speaks of; readers do not see it."""
    return f"<!-- exports {fingerprint_text(json.dumps(result.exports, sort_keys=True))} -->"


_ROLES = {"student": "this student", "undistilled": "not distilled", "teacher": "teacher"}
_PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "spans": "question-answering",
    "generation": "text-generation",
}


def _front_matter(
    folder: Path, settings: Settings, licence: Licence, task: str | None
) -> dict[str, Any]:
    teacher = settings.teacher
    embeds = task is None and (folder / "modules.json").is_file()
    front: dict[str, Any] = {"license": licence.identifier, "license_name": licence.name}
    front["language"] = licence.languages
    front["library_name"] = "sentence-transformers" if embeds else "transformers"
    front["pipeline_tag"] = "sentence-similarity" if embeds else "feature-extraction"
    tags = ["minilm", "distillation", "feature-extraction"]
    if task is not None:
        front["pipeline_tag"] = _PIPELINES[settings.tasks[task].kind]
        tags[-1] = front["pipeline_tag"]
    source = teacher.path or (None if teacher.package else teacher.hub_id)
    if source is not None and teacher.weights != "random" and not is_there(source):
        front["base_model"] = source
    data = [] if "corpus" in settings.unread_groups else _hub_corpora(settings)
    if task is not None and getattr(settings.tasks[task], "data", None) is not None:
        data = [*data, settings.tasks[task].data.hub_id]
    front["datasets"] = list(dict.fromkeys(data))
    front["tags"] = [*tags, "sentence-transformers"] if embeds else tags
    return {key: value for key, value in front.items() if value}


def _corpora(settings: Settings) -> list[Corpus]:
    """What the stages distilled on, or the task was made from."""
    corpora = [stage.settings.corpus for stage in settings.corpus_stages]
    return corpora or ([settings.corpus] if settings.has_task_of_corpus else [])


def _hub_corpora(settings: Settings) -> list[str]:
    sources = [source for corpus in _corpora(settings) for source in corpus.datasets]
    return [source.path for source in sources if not is_there(source.path)]


def _about(settings: Settings, result: Result, licence: Licence) -> str:
    teacher, student = settings.teacher, settings.chain[-1].settings.student
    source = teacher.path or teacher.package or teacher.hub_id
    if source is None or teacher.weights == "random":
        source = "random weights"
    elif is_there(source):  # where it lies here is nobody else's business
        source = Path(source).name
    lines = [
        f"A {student.num_layers} x {student.hidden_size} {teacher.model_type} encoder, distilled"
        f" from {_plain(teacher.name)} ({_plain(source)})"
    ]
    if "layer_selection" not in settings.unread_groups:
        lines[0] += (
            f", teacher layer {settings.layer_selection.teacher_layer} of {teacher.num_layers}"
            ' where layers are "selected"'
        )
    if settings.recipe.name == "finetune":
        path = Path(settings.student.path or "")
        name = path.parent.name if path.name == "student" else path.name
        lines = [f"The checkpoint {_plain(name)}, fine-tuned."]
    lines += ["", f"- Licence: {_licence(licence)}"]
    lines += [f"- Data: {line}" for line in _data(settings)]
    lines += [f"- Seed: {settings.seed}", *_method(settings)]
    lines += [f"- MLflow run: {result.run_id}; run key: {result.run_key}"]
    known = ("git_commit", "precision", "device", "threads")
    made_by = [f"{name} {_plain(result.made_by[name])}" for name in known if name in result.made_by]
    lines += [f"- Made by: {', '.join(made_by)}"] if made_by else []
    return "\n".join(lines)


def _licence(licence: Licence) -> str:
    if licence.identifier is None:
        return f"**not known**: {_plain(licence.source)} names none"
    name = licence.identifier + (f" ({licence.name})" if licence.name else "")
    return (
        f"{_plain(name)}, that of the teacher according to {_plain(licence.source)};"
        " the data have licences of their own"
    )


def _data(settings: Settings) -> list[str]:
    """What was learnt from, with its licence where it says one."""
    lines = []
    if "corpus" not in settings.unread_groups:
        for corpus in _corpora(settings):
            lines += [
                f"the files {_plain(Path(pattern).name)} (licence not known)"
                for pattern in corpus.files
            ]
            lines += [_data_set(source.path, source.revision) for source in corpus.datasets]
            if not corpus.files and not corpus.datasets:
                lines.append("English Wikipedia articles shipped with gensim 4.4.0 (CC BY-SA)")
    for name, task in settings.tasks.items():
        data = getattr(task, "data", None)
        if data is not None:
            lines.append(f"task {_plain(name)}: {_data_set(data.hub_id, data.revision)}")
        elif getattr(task, "files", None) is not None:
            lines.append(f"task {_plain(name)}: files of the user (licence not known)")
        else:
            made = "the corpus, labelled by the teacher"
            if not isinstance(task, TeacherLabels):
                made = "made from held-out text of the corpus"
            lines.append(f"task {_plain(name)}: {made}")
    return list(dict.fromkeys(lines))


def _data_set(path: str, revision: str | None) -> str:
    if is_there(path):
        return f"the folder {_plain(Path(path).name)} (licence not known)"
    found = of_hub(path, revision, "dataset")
    licence = found.name or found.identifier or "licence not known"
    return f"{_plain(path)} ({_plain(licence)})"


def _sizes(settings: Settings, result: Result) -> list[list[str]]:
    rows = []
    if result.speedup is not None:
        rows.append([f"speedup over {result.baseline}", f"x{result.speedup:.2f}"])
    for role, counts in result.parameters.items():
        for part, number in counts.items():
            what = "parameters without pooler" if part == "total" else f"parameters, {part}"
            rows.append([what + (f" of the {role}" if role != "student" else ""), f"{number:,}"])
    if result.elapsed_seconds is not None:
        rows.append(["the run took", f"{result.elapsed_seconds:.0f} s"])
    return rows


def _losses(result: Result) -> list[list[str]]:
    stages = result.stages or {"": result.validation_losses}
    return [
        [f"{stage}: {term}" if stage else term, f"{value:.4f}"]
        for stage, losses in stages.items()
        for term, value in losses.items()
    ]


def _scores(settings: Settings, result: Result) -> list[list[str]]:
    """Every metric; the mean over seeds with its standard deviation."""
    rows = []
    tasks = dict.fromkeys(task for found in result.metrics.values() for task in found)
    for task in tasks:
        found = {role: result.metrics.get(role, {}).get(task, {}) for role in _ROLES}
        for metric in dict.fromkeys(name for metrics in found.values() for name in metrics):
            row = [task, metric]
            for role in _ROLES:
                value = found[role].get(metric)
                spread = result.spreads.get(role, {}).get(task, {}).get(metric)
                row.append("-" if value is None else f"{value:.4f}")
                row[-1] += "" if spread is None else f" ± {spread:.4f} (n={result.num_seeds})"
            rows.append(row)
    return rows


def _exports(result: Result) -> str:
    parts = []
    for name, measured in result.exports.items():
        rows = export_rows(measured)
        parts.append(
            f"Exports of {_plain(name)} on a CPU, all timed side by side with"
            f" {measured['threads']} threads:\n\n{_table(rows[0], rows[1:])}"
        )
    return "\n\n".join(["## Exports", *parts]) if parts else ""


def export_rows(measured: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a table of one model's exports, see `Measured`."""
    models = measured["models"]
    sizes = list(models["student"]["milliseconds"])
    tasks = [
        (task, metric)
        for task, metrics in models["student"]["scores"].items()
        for metric in metrics
    ]
    has_teacher = "teacher" in models
    rows = [
        ["model", "MB", *(f"ms, batch of {size}" for size in sizes)]
        + [f"speedup, batch of {size}" for size in sizes if has_teacher]
        + ["largest difference", *(f"{task} {metric}" for task, metric in tasks)]
    ]
    for model, one in models.items():
        differences = [f"{value:.2g} ({name})" for name, value in one["differences"].items()]
        values = [one["scores"].get(task, {}).get(metric) for task, metric in tasks]
        rows.append(
            [model, f"{one['megabytes']:.1f}"]
            + [f"{one['milliseconds'][size]:.2f}" for size in sizes]
            + [f"x{one['speedup'][size]:.2f}" for size in sizes if has_teacher]
            + [", ".join(differences) or "-"]
            + ["-" if value is None else f"{value:.4f}" for value in values]
        )
    return rows


def _use(folder: Path, settings: Settings, task: str | None) -> str:
    if task is None and (folder / "modules.json").is_file():
        return _fenced(
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("FOLDER")\n'
            'embeddings = model.encode(["a sentence", "another one"])\n',
            "python",
        )
    kind = None if task is None else settings.tasks[task].kind
    if kind == "generation":
        return "`python -m minilm_exp.generate` writes with it."
    heads = {None: "", "spans": "ForQuestionAnswering"}
    name = f"AutoModel{heads.get(kind, 'ForSequenceClassification')}"
    return _fenced(
        f"from transformers import {name}, AutoTokenizer\n\n"
        f'model = {name}.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n',
        "python",
    )


def _config(settings: Settings) -> str:
    """What the result depends on; folders, hosts and the like are nobody else's business."""
    plain = as_dict(settings)
    for name in NEUTRAL:
        del plain[name]
    return str(yaml.safe_dump(_without_folders(redact_all(plain)), sort_keys=False))


def _without_folders(node: Any) -> Any:
    """The same data with the last part only of each path from the root or from home."""
    if isinstance(node, dict):
        return {name: _without_folders(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_without_folders(value) for value in node]
    is_path = isinstance(node, str) and node.startswith(("/", "~", "./", "../"))
    return Path(node).name if is_path else node


def _fenced(text: str, language: str) -> str:
    """A block of code, whatever backticks are in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """A name, wherever it comes from, in one line and without meaning for markdown."""
    line = " ".join(str(text).split())
    return re.sub(r"[\\`*\[\]<>|]", lambda found: f"\\{found[0]}", line)


def _method(settings: Settings) -> list[str]:
    """What was distilled, in every stage."""
    described = []
    for stage in settings.corpus_stages:
        own = stage.settings
        text = f"{', '.join(map(_term, own.objective.terms.values()))} ({own.objective.name})"
        training = own.training
        text += (
            f", {training.max_steps} steps of {training.batch_size} sequences of"
            f" {own.corpus.block_length} tokens"
        )
        if settings.stages:
            start = f", which goes on from {stage.start}" if stage.start else ""
            student = own.student
            text = (
                f"stage {stage.name} ({student.num_layers} x {student.hidden_size} from"
                f" {own.teacher.name}{start}): {text}"
            )
        described.append(f"- Distilled: {_plain(text)}")
    return described


def _term(term: AnyTerm) -> str:
    if isinstance(term, RelationTerm):
        pairs = "_".join(term.pairs)
        return f"{pairs} relations, {term.num_relation_heads} heads, layers {term.layers}"
    if isinstance(term, StateTerm):
        compared = "modules" if term.modules else f"{term.state} states, layers {term.layers}"
        return f"{term.distance} of {compared}"
    if isinstance(term, LogitTerm):
        return f"soft labels ({term.distance}, temperature {term.temperature:g})"
    if isinstance(term, LabelTerm):
        return "labels"
    return f"attention scores, layers {term.layers}"


def _warning(untrained: list[str]) -> str:
    layers = [name for name in untrained if "pooler" not in name]
    if not layers:
        return ""
    return f"""## Fine-tune before use

The objective does not reach all of the model. These parameters were **not trained** by the
distillation and have their first weights; outputs of this checkpoint as it is (for example as
sentence embeddings) are not meaningful before fine-tuning:
{", ".join(f"`{name}`" for name in untrained)}.
"""
