"""The corpus and the whole training, through the same functions as run.py."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from transformers import PreTrainedTokenizerFast

from benchmarks.measure import REPOSITORY
from benchmarks.naive import NaiveDistiller, padded_batches
from minilm_exp.corpus import fingerprint_corpus, prepare_corpus
from minilm_exp.distil import distil
from minilm_exp.documents import read_documents, sentences
from minilm_exp.objectives import build_objective
from minilm_exp.parsing import parse
from minilm_exp.precision import resolve_precision
from minilm_exp.resolvers import register_resolvers
from minilm_exp.settings import Corpus, Settings
from minilm_exp.student import build_student
from minilm_exp.teacher import load_encoder, load_tokenizer
from minilm_exp.teacher_cache import Plan, TeacherCaches


def settings(*overrides: str) -> Settings:
    """Default settings with overrides, as run.py would compose them."""
    register_resolvers()
    with initialize_config_dir(str(REPOSITORY / "conf")):
        typed = {override.split("=")[0] for override in overrides}
        return parse(compose("config", list(overrides)), "teacher" in typed, typed)


def packaged_text() -> list[str]:
    """Sentences of the packaged corpus."""
    corpus: Corpus = settings().corpus
    return [s for document in read_documents(corpus) for s in sentences(document)]


def write_text(path: Path, num_bytes: int) -> None:
    """A text of about that size: the packaged corpus again and again, each copy changed a bit."""
    corpus: Corpus = settings().corpus
    documents = list(read_documents(corpus))
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for copy in itertools.count():
            for document in documents:
                written += file.write(f"copy {copy}. {document}\n\n")
                if written >= num_bytes:
                    return


def prepare(text: Path, outputs: Path) -> float:
    """Tokenises and packs a text; seconds."""
    chosen = settings(f"corpus.files=[{text}]", f"outputs_dir={outputs}")
    tokenizer = load_tokenizer(chosen.teacher)
    fingerprint = fingerprint_corpus(chosen.corpus)
    start = time.perf_counter()
    prepare_corpus(chosen, tokenizer, fingerprint)
    return time.perf_counter() - start


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[list[int]]:
    """Each text as an example of its own, special tokens included, cut off at `length`."""
    encoded = tokenizer(texts, truncation=True, max_length=length, return_attention_mask=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


class WholeTraining:
    """The training of run.py and the naive one, on the same text and from the same models.

    Ours is `distil` as run.py calls it, its evaluations included; the naive one has none.
    """

    def __init__(self, texts: list[str], folder: Path, num_steps: int) -> None:
        file = folder / "text.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        self.settings = settings(
            f"corpus.files=[{file}]",
            f"outputs_dir={folder}",
            "task=none",
            f"training.max_steps={num_steps}",
            "training.warmup_steps=2",
        )
        self.tokenizer = load_tokenizer(self.settings.teacher)
        self.corpus = prepare_corpus(
            self.settings, self.tokenizer, fingerprint_corpus(self.settings.corpus)
        )
        self.examples = token_ids(texts, self.tokenizer, self.settings.corpus.block_length)
        self.folder = folder
        self.num_calls = 0

    def ours(self, cached: bool) -> float:
        """Tokens a second of one training, with a cache that was filled before or without one."""
        chosen = self.settings
        teacher, student = self._models()
        training, self.num_calls = chosen.training, self.num_calls + 1
        caches = self._caches() if cached else None
        start = time.perf_counter()
        distil(
            chosen,
            teacher,
            student,
            build_objective(chosen, teacher, student),
            self.tokenizer,
            self.corpus,
            resolve_precision(training.precision, "cpu"),
            self.folder / f"checkpoints-{self.num_calls}",
            lambda metrics, step: None,
            caches,
        )
        seconds = time.perf_counter() - start
        if caches is not None:
            caches.close()
        return training.max_steps * training.batch_size * chosen.corpus.block_length / seconds

    def naive(self, num_steps: int, precision: str) -> float:
        """Real tokens a second of the naive training."""
        chosen = self.settings
        heads = chosen.relation_set.num_relation_heads
        naive = NaiveDistiller(*self._models(), chosen.layer_selection.teacher_layer, heads)
        num_tokens = 0
        start = time.perf_counter()
        batches = padded_batches(self.examples, chosen.training.batch_size, chosen.seed)
        for input_ids, attention_mask in itertools.islice(batches, num_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                naive.step(input_ids, attention_mask)
            num_tokens += int(attention_mask.sum())
        return num_tokens / (time.perf_counter() - start)

    def _models(self) -> tuple[Any, Any]:
        chosen = self.settings
        teacher = load_encoder(chosen.teacher)
        layer = chosen.layer_selection.teacher_layer
        student = build_student(
            chosen.student, teacher, self.tokenizer, layer, (0.0, 0.0), chosen.seed
        )
        return teacher, student

    def _caches(self) -> TeacherCaches:
        chosen = self.settings
        validation = self.corpus.validation.spread(chosen.training.evaluation_sequences)
        return TeacherCaches(
            self.folder / "teacher",
            "bench",
            {"train": self.corpus.train.lengths, "validation": validation.lengths},
            chosen.teacher.hidden_size,
            Plan(True, "", 0),
            1e12,
        )
