"""Fine-tuning and evaluation of a task, ours and as transformers' plain recipe has them.

Ours is `minilm_exp.tasks.finetune` as run.py calls it. The plain recipe is the library's `Trainer`:
examples padded to max_length beforehand, float32, random order, and `Trainer.predict`. Both start
from the same model, with the same examples, batch size, dropout and optimiser.

No data set ships with the repository, so examples are made of the packaged text: pairs of sentences
that are as long as QNLI's (the table of `minilm_exp.speed`), and clauses that are about as long as
the phrases of SST-2.
"""

from __future__ import annotations

import copy
import itertools
import re
import time
from bisect import bisect_left
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.scale import settings, token_ids
from minilm_exp.provenance import fingerprint_text
from minilm_exp.speed import QNLI_LENGTHS
from minilm_exp.student import set_dropout
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import Examples, TaskData
from minilm_exp.tasks.finetune import Finetuning, finetune, predict
from minilm_exp.teacher import load_encoder, load_tokenizer

TASK = "qnli"
QNLI_EXAMPLES = 104_743
SST2_EXAMPLES = 67_349
# Of a pair's first sentence, at most: about what QNLI's questions have.
_FIRST_TOKENS = 14


class FinetuningSpeed:
    """One epoch of training and one evaluation, by ours and by the plain recipe.

    Every padded example costs the same, so the plain recipe reads only the first `num_plain`. Ours
    reads all: the more there are, the more alike in length are those of a batch. Tokenising is done
    here, before anything is timed.
    """

    def __init__(self, texts: list[str], num_ours: int, num_plain: int, folder: Path) -> None:
        self.num_ours, self.num_plain, self.folder = num_ours, num_plain, folder
        self.chosen = settings(f"task={TASK}", "task_training=minilmv2", "task_training.epochs=1")
        self.task = self.chosen.tasks[TASK]
        [self.training] = self.chosen.task_training.cells(TASK, self.task)
        self.tokenizer = load_tokenizer(self.chosen.teacher)
        self.encoder = load_encoder(self.chosen.teacher)
        examples = self._pairs(texts)
        # What is validated after the epoch is timed by itself.
        self.data = TaskData(examples, {"": examples.at_most(1)}, {}, num_labels=2)
        # `finetune` finds it again.
        self.encoded = encode(examples, self.task.kind, True, self.tokenizer, self.training, folder)
        self.padded = examples.rows.select(range(num_plain)).map(
            lambda rows: self.tokenizer(
                rows["first"],
                rows["second"],
                truncation=True,
                padding="max_length",
                max_length=self.training.max_length,
            ),
            batched=True,
        )
        self.evaluated = self._model()
        self.predictor = self._plain_trainer(self._model())

    def train(self, precision: str) -> None:
        """Ours, from the encoder to the trained model."""
        job = Finetuning(
            name=TASK,
            task=self.task,
            data=self.data,
            settings=self.training,
            seed=self.chosen.seed,
            precision=precision,
            runtime=self.chosen.runtime,
            cache=self.folder,
        )
        finetune(self.encoder, self.tokenizer, job, "benchmark", lambda metrics, step: None)

    def train_plainly(self) -> None:
        """The same by the plain recipe."""
        self._plain_trainer(self._model()).train()

    def evaluate(self, precision: str) -> None:
        """Our predictions."""
        predict(self.evaluated, self.encoded, self.tokenizer, precision)

    def evaluate_plainly(self) -> None:
        """Those of the plain recipe."""
        self.predictor.predict(self.padded)

    def real_share(self, num_examples: int) -> float:
        """Share of real tokens in our training batches, had the task so many examples."""
        lengths = _pair_lengths(num_examples)
        size = self.training.batch_size
        draw = torch.Generator().manual_seed(self.chosen.seed)
        sampler = LengthGroupedSampler(size, lengths=lengths, generator=draw)
        order = [lengths[index] for index in sampler]
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)

    def plain_share(self) -> float:
        """Share of real tokens in the plain recipe's batches."""
        return float(numpy.mean(self.encoded["length"])) / self.training.max_length

    def tokenise_seconds(self, texts: list[str], num_examples: int, num_rounds: int) -> float:
        """Seconds in which single short texts are encoded and written, all cores."""
        parts = (part.strip() for text in texts for part in re.split("[,;:()]", text))
        clauses = [part for part in parts if 3 <= len(part.split()) <= 40]
        chosen = list(itertools.islice(itertools.cycle(clauses), num_examples))
        rows = Dataset.from_dict({"first": chosen, "label": [0] * num_examples})
        seconds = []
        for _ in range(num_rounds):
            with TemporaryDirectory() as empty:
                start = time.perf_counter()
                encode(
                    Examples(rows, "clauses"),
                    self.task.kind, True, self.tokenizer, self.training, Path(empty),
                )  # fmt: skip
                seconds.append(time.perf_counter() - start)
        return median(seconds)

    def _pairs(self, texts: list[str]) -> Examples:
        """Pairs with two labels; each sentence is the next one that has the wanted length."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        single = self.tokenizer.num_special_tokens_to_add()
        by_length: dict[int, list[str]] = {}
        for text, ids in zip(texts, token_ids(texts, self.tokenizer, self.training.max_length)):
            by_length.setdefault(len(ids) - single, []).append(text)
        lengths = sorted(by_length)
        sentences = {length: itertools.cycle(found) for length, found in by_length.items()}

        def sentence(length: int) -> str:
            place = min(bisect_left(lengths, length), len(lengths) - 1)
            return next(sentences[lengths[place]])

        pairs = []
        for number, length in enumerate(_pair_lengths(self.num_ours)):
            first = min(_FIRST_TOKENS, (length - special) // 2)
            pairs.append((sentence(first), sentence(length - special - first), number % 2))
        columns = dict(zip(("first", "second", "label"), map(list, zip(*pairs))))
        return Examples(Dataset.from_dict(columns), fingerprint_text(repr(pairs)))

    def _model(self) -> PreTrainedModel:
        config = copy.deepcopy(self.encoder.config)
        set_dropout(config, self.training.hidden_dropout, self.training.attention_dropout)
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(self.encoder.state_dict())
        return model

    def _plain_trainer(self, model: PreTrainedModel) -> Trainer:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(self.folder / "plain"),
                num_train_epochs=self.training.epochs,
                per_device_train_batch_size=self.training.batch_size,
                per_device_eval_batch_size=self.training.batch_size,
                learning_rate=self.training.learning_rate,
                warmup_steps=self.training.warmup_ratio,
                weight_decay=self.training.weight_decay,
                seed=self.chosen.seed,
                use_cpu=True,
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=self.padded,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def _pair_lengths(number: int) -> list[int]:
    """Tokens of so many pairs, special ones included, drawn as QNLI has them."""
    twentieths = numpy.arange(len(QNLI_LENGTHS))
    places = numpy.random.default_rng(0).uniform(0, twentieths[-1], number)
    return [int(length) for length in numpy.interp(places, twentieths, QNLI_LENGTHS)]
