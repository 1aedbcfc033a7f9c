"""The student as a plain Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp.sentence_modules import keep_modules
from minilm_exp.student import set_dropout


def save_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    modules: Path | None = None,
) -> None:
    """Writes config, safetensors and tokenizer; the folder appears only when all is written.

    The saved config has the teacher's dropout, which fine-tuning expects, not the one that was
    used for distillation.

    Args:
        student: The encoder.
        teacher: Gives the dropout.
        tokenizer: The student's.
        folder: Is replaced.
        modules: A sentence encoder's folder, whose modules the student keeps.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    used = _dropout(student)
    set_dropout(student.config, *_dropout(teacher))
    try:
        student.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if modules is not None:
            keep_modules(modules, partial)
    finally:
        set_dropout(student.config, *used)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _dropout(encoder: PreTrainedModel) -> tuple[float, float]:
    config = encoder.config
    hidden = getattr(config, "hidden_dropout_prob", getattr(config, "dropout", 0.0))
    attention = getattr(
        config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0)
    )
    return hidden or 0.0, attention or 0.0
