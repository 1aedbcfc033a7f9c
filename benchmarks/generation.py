"""Generation: what a cache gains, and the two ways to predict a target, on a small case.

    python -m benchmarks.generation data_root=DIR

fine-tunes the default student, not distilled, on SQuAD question generation twice for each seed:
`next` predicts each token of the target at the one before it, as the package does; `mask` at a
[MASK] beside it, which sees the source, the target before it and itself (s2s-ft). Both read the
same batches in the same order, and begin with the same head.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from benchmarks.scale import settings
from minilm_exp.downstream import find_tasks
from minilm_exp.prefix_lm import PrefixLM, prefix_lm_class, prefix_mask, target_loss
from minilm_exp.student import build_student
from minilm_exp.task_settings import Task
from minilm_exp.tasks.data import load_task
from minilm_exp.tasks.examples import Examples
from minilm_exp.tasks.seq2seq import Seq2SeqCollator, encode_seq2seq, writing_of
from minilm_exp.tasks.text_scores import text_scores
from minilm_exp.teacher import load_encoder, load_tokenizer
from minilm_exp.writer import Writer, Writing

_BATCH_SIZE, _LEARNING_RATE, _SMOOTHING = 16, 5e-4, 0.1


class CachedDecoding:
    """Targets of 48 tokens for sources of so many, with a cache and with the prefix anew."""

    def __init__(self, num_sources: int, num_source_tokens: int, num_beams: int = 1) -> None:
        chosen = settings()
        tokenizer = load_tokenizer(chosen.teacher)
        encoder = load_encoder(chosen.teacher)
        writing = Writing(num_source_tokens, 48, min_length=47, num_beams=num_beams)
        torch.manual_seed(0)
        model = prefix_lm_class(encoder.config.model_type)(encoder.config)
        model.base_model.load_state_dict(encoder.state_dict(), strict=False)
        self._writer = Writer(model.eval(), tokenizer, writing)
        draw = torch.randint(1000, 20000, (num_sources, num_source_tokens))
        self._sources = draw.tolist()

    def decode(self, use_cache: bool) -> list[list[int]]:
        """Token ids."""
        return self._writer.decode(self._sources, use_cache)


@dataclass
class Data:
    """Encoded examples to train and to validate on, and the right targets of the latter."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    targets: list[str]


class NextToken:
    """Predicts a token at the one before it."""

    name = "next"

    def __init__(self, model: PrefixLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Of every token of the targets, row by row."""
        logits: Tensor = self.model(**batch).logits
        return logits

    def write(self, rows: list[dict[str, Any]], writing: Writing) -> list[str]:
        """Greedily."""
        sources = [row["input_ids"][: row["num_source"]] for row in rows]
        return Writer(self.model, self.tokenizer, writing).write_encoded(sources)


class PseudoMasks(NextToken):
    """Predicts a token at a [MASK] in its place."""

    name = "mask"

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        num_tokens = ids.shape[1]
        real, source = batch["attention_mask"].bool(), batch["source_mask"].bool()
        is_target = real & ~source
        masks = torch.full_like(ids, int(self.tokenizer.mask_token_id))
        # The [MASK] of a place sees what stands before the place, and itself.
        sees = prefix_mask(real, source, num_tokens)
        is_before = sees & ~torch.eye(num_tokens, dtype=torch.bool)
        itself = torch.eye(num_tokens, dtype=torch.bool).expand_as(sees)
        nothing = torch.zeros_like(sees)
        full = torch.cat([torch.cat([sees, nothing], 2), torch.cat([is_before, itself], 2)], dim=1)
        places = torch.arange(num_tokens).expand_as(ids)
        segments = (~source).long()
        states = self.model.base_model(
            torch.cat([ids, masks], 1),
            attention_mask=full[:, None],
            position_ids=torch.cat([places, places], 1),
            token_type_ids=torch.cat([segments, segments], 1),
            use_cache=False,
        ).last_hidden_state[:, num_tokens:]
        assert int(is_target.sum()) == int((labels != -100).sum())
        head: nn.Module = getattr(self.model, self.model.head_name)
        logits: Tensor = head(states[is_target])
        return logits

    @torch.inference_mode()
    def write(self, rows: list[dict[str, Any]], writing: Writing) -> list[str]:
        """Without a cache, one source after the other: only what is written counts here."""
        self.model.eval()
        texts = []
        end = int(self.tokenizer.sep_token_id)
        collate = Seq2SeqCollator(self.tokenizer)
        never = [token for token in self.tokenizer.all_special_ids if token != end]
        for row in rows:
            own = row["input_ids"][: row["num_source"]]
            written: list[int] = []
            while len(written) < writing.max_length:
                ids = [*own, *written, end]  # the last is not seen by its own [MASK]
                given = {"input_ids": ids, "num_source": len(own), "index": 0}
                scores = self.logits(collate([given]))[-1]
                scores[never] = -torch.inf
                token = int(scores.argmax())
                if token == end:
                    break
                written.append(token)
            text: Any = self.tokenizer.decode(written, clean_up_tokenization_spaces=True)
            texts.append(text)
        return texts


def _data(
    chosen: Any, tokenizer: PreTrainedTokenizerFast, num_train: int, num_validation: int
) -> Data:
    task = chosen.tasks["squad_qg"]
    assert isinstance(task, Task)
    [cell] = chosen.task_training.cells("squad_qg", task)
    writing = writing_of(cell)
    loaded = load_task("squad_qg", task, find_tasks(chosen)["squad_qg"])

    def encoded(examples: Examples) -> list[dict[str, Any]]:
        columns = encode_seq2seq(
            examples.rows[:], tokenizer, writing.max_source_length, writing.max_length, True
        )
        return [
            {"input_ids": ids, "num_source": number, "index": 0}
            for ids, number in zip(columns["input_ids"], columns["num_source"])
        ]

    validation = loaded.validation[""].at_most(num_validation)
    return Data(
        encoded(loaded.train.at_most(num_train)), encoded(validation), validation.rows["target"][:]
    )


def _train(way: NextToken, data: Data, num_steps: int, seed: int) -> dict[str, float]:
    """Trains, and measures on the validation examples."""
    model, collate = way.model.train(), Seq2SeqCollator(way.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    start = time.process_time()
    for _ in range(num_steps):
        if len(order) < _BATCH_SIZE:
            order = torch.randperm(len(data.train), generator=draw).tolist()
        chosen, order = order[:_BATCH_SIZE], order[_BATCH_SIZE:]
        batch = collate([data.train[number] for number in chosen])
        del batch["index"]
        loss = target_loss(way.logits(batch), batch["labels"], _SMOOTHING)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.process_time() - start
    model.eval()
    sums = num_tokens = 0.0
    with torch.inference_mode():
        for first in range(0, len(data.validation), _BATCH_SIZE):
            batch = collate(data.validation[first : first + _BATCH_SIZE])
            del batch["index"]
            number = int((batch["labels"] != -100).sum())
            sums += number * float(target_loss(way.logits(batch), batch["labels"], 0.0))
            num_tokens += number
    texts = way.write(data.validation, Writing(64, 32))
    return {
        "loss": sums / num_tokens,
        "rougeL": text_scores(["rougeL"], data.targets, texts)["rougeL"],
        "seconds a step": seconds / num_steps,
    }


def main() -> None:
    """Prints each seed and the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_root", type=lambda given: given.removeprefix("data_root="))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--validation", type=int, default=100)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    root = str(Path(arguments.data_root).resolve())
    chosen = settings("task=squad_qg", f"data_root={root}", "student.init=teacher_layers")
    tokenizer, teacher = load_tokenizer(chosen.teacher), load_encoder(chosen.teacher)
    data = _data(chosen, tokenizer, arguments.train, arguments.validation)
    found: dict[str, list[dict[str, float]]] = {"next": [], "mask": []}
    for seed in range(1, arguments.seeds + 1):
        for kind in (NextToken, PseudoMasks):
            encoder = build_student(
                chosen.student, teacher, tokenizer, chosen.teacher.num_layers, (0.1, 0.0), seed
            )
            torch.manual_seed(seed)
            model = prefix_lm_class(encoder.config.model_type)(encoder.config)
            model.base_model.load_state_dict(encoder.state_dict(), strict=False)
            values = _train(kind(model, tokenizer), data, arguments.steps, seed)
            found[kind.name].append(values)
            print(seed, kind.name, {name: round(value, 4) for name, value in values.items()})
    for kind_name, rows in found.items():
        for name in rows[0]:
            values_of = [row[name] for row in rows]
            spread = stdev(values_of) if len(rows) > 1 else 0.0
            print(f"{kind_name:5} {name:15} {fmean(values_of):.4f} ± {spread:.4f}")


if __name__ == "__main__":
    main()
