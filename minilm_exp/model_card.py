"""The model card of a student."""

from __future__ import annotations

from pathlib import Path

import yaml

from minilm_exp.objective_settings import (
    AnyTerm,
    LabelTerm,
    LogitTerm,
    RelationTerm,
    StateTerm,
)
from minilm_exp.redaction import redact, redact_all
from minilm_exp.result import Result
from minilm_exp.settings import Settings, as_dict


def write_model_card(folder: Path, settings: Settings, result: Result) -> None:
    """README.md of the checkpoint: what it is, the measured numbers, what to know, the config."""
    teacher, student = settings.teacher, settings.chain[-1].settings.student
    rows = [
        (f"speedup over {result.baseline}", f"x{result.speedup:.2f}"),
        ("parameters without pooler", f"{result.parameters['student']['total']:,}"),
        ("validation loss", f"{result.validation_loss:.4f}"),
    ]
    for role, name in (
        ("student", "this student" + " after the stages on the task" * bool(settings.task_stages)),
        ("undistilled", "not distilled"),
        ("teacher", "teacher"),
    ):
        for task, score in result.scores_of(role).items():
            rows.append((f"{task} ({settings.tasks[task].score}), {name}", f"{score:.4f}"))
    data = (
        ", ".join(settings.corpus.files)
        or ", ".join(source.path for source in settings.corpus.datasets)
        or "English Wikipedia articles shipped with gensim 4.4.0 (CC BY-SA)"
    )
    warning = (
        "\n**Not meaningful: the teacher had random weights.**\n"
        if teacher.weights == "random"
        else ""
    )
    config = yaml.safe_dump(redact_all(as_dict(settings)), sort_keys=False)
    card = (
        f"""---
library_name: transformers
tags: [minilm, distillation, feature-extraction]
---

# {settings.student_name} distilled from {teacher.name}
{warning}
A {student.num_layers} x {student.hidden_size} {teacher.model_type} encoder, distilled from
{teacher.name} ({teacher.hub_id or teacher.package or teacher.path or "random weights"}),
teacher layer {settings.layer_selection.teacher_layer} of {teacher.num_layers} where layers are
"selected".

- Data: {data}; seed {settings.seed}
{_method(settings)}- MLflow run: {result.run_id}; run key: {result.run_key}

| measured | value |
| --- | --- |
"""
        + "".join(f"| {name} | {value} |\n" for name, value in rows)
        + f"""
{_warning(result.untrained)}
## Use

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## Config

```yaml
{config}```
"""
    )
    (folder / "README.md").write_text(redact(card), encoding="utf-8")


def _method(settings: Settings) -> str:
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
        described.append(f"- Distilled: {text}\n")
    return "".join(described)


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
