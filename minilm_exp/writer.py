"""A fine-tuned generator: it reads texts and writes what was learnt, a summary or a question."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from minilm_exp.checkpoint_code import check_folder
from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.prefix_lm import PrefixLM, prefix_lm_class
from minilm_exp.settings import max_tokens

# Beside the weights of a generator: how it reads and writes.
WRITING_FILE = "writing.json"


@dataclass(frozen=True)
class Writing:
    """How texts are cut, and how the target is searched.

    Attributes:
        max_source_length: Tokens of a source with its special ones; longer ones are cut.
        max_length: Tokens of a target, its closing one counted.
        source_column: What the sources were called where the model learnt.
        min_length: As many at least.
        num_beams: 1 is greedy.
        length_penalty: The sum of a target's log probabilities is divided by its length to this
            power; above 0 it favours longer ones.
        no_repeat_ngram_size: An n-gram of so many tokens stands once in a target, unless a full
            stop is in it; 0 for none.
    """

    max_source_length: int
    max_length: int
    source_column: str = "source"
    min_length: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class Source:
    """Token ids of a source with its special ones, none if it is empty; and whether it was cut."""

    ids: list[int]
    is_cut: bool


class Writer:
    """A model with the prefix mask, its tokenizer and its settings.

    Raises:
        ExperimentError: The model has too few positions, or the lengths contradict each other.
    """

    def __init__(
        self, model: PrefixLM, tokenizer: PreTrainedTokenizerFast, writing: Writing
    ) -> None:
        config: Any = model.config
        positions = max_tokens(config.model_type, config.max_position_embeddings)
        if writing.max_source_length + writing.max_length > positions:
            raise ExperimentError(
                f"{writing.max_source_length} tokens of the source and max_length="
                f"{writing.max_length} of the target are more than the {positions} positions of the"
                " model: lower max_length"
            )
        if writing.min_length >= writing.max_length:
            raise ExperimentError(
                f"min_length={writing.min_length} must be below max_length={writing.max_length}"
            )
        self.model, self.tokenizer, self.writing = model, tokenizer, writing

    @classmethod
    def load(cls, folder: str | Path) -> Writer:
        """A generator that was fine-tuned here.

        Raises:
            ExperimentError: The folder is none, or is damaged.
        """
        folder = Path(folder).expanduser()
        if not (folder / WRITING_FILE).is_file():
            raise ExperimentError(
                f"{folder} is no fine-tuned generator (it has no {WRITING_FILE}): give a folder"
                " models/TASK-student of a run with recipe=finetune task=xsum, or the like"
            )
        check_folder(folder, "the generator")
        try:
            writing = Writing(**json.loads((folder / WRITING_FILE).read_text("utf-8")))
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            loaded: Any = prefix_lm_class(config.model_type).from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ExperimentError:
            raise
        except Exception as error:  # files can be wrong in as many ways as there are loaders
            raise ExperimentError(f"{folder} cannot be loaded: {reason_of(error)}") from error
        model, found = loaded
        lacking = sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]}))
        if lacking:
            raise ExperimentError(f"{folder} lacks weights: {lacking[0]}")
        return cls(model.eval(), tokenizer, writing)

    def save(self, folder: Path) -> None:
        """Writes what `load` reads."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / WRITING_FILE).write_text(json.dumps(asdict(self.writing), indent=1), "utf-8")

    def write(
        self,
        texts: Sequence[str],
        batch_size: int = 16,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """The target of each source; see `Writing`.

        Args:
            texts: The sources; none may be empty.
            batch_size: Sources at once.
            progress: Called with the number of targets that are done since the last time.

        Raises:
            ExperimentError: A source has no token.
        """
        sources = encode_sources(texts, self.tokenizer, self.writing.max_source_length)
        for text, source in zip(texts, sources):
            if not source.ids:
                raise ExperimentError(f"the source {text!r:.100} is empty: it has no token")
        return self.write_encoded([source.ids for source in sources], batch_size, progress)

    def write_encoded(
        self,
        sources: Sequence[list[int]],
        batch_size: int = 16,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """The same for token ids of sources. Sources of like length are read together."""
        targets = [""] * len(sources)
        for rows in _by_length(sources, batch_size):
            texts = self.tokenizer.batch_decode(
                self.decode([sources[row] for row in rows]),
                skip_special_tokens=True,
                clean_up_tokenization_spaces=True,
            )
            for row, text in zip(rows, texts):
                targets[row] = text.strip()
            if progress is not None:
                progress(len(rows))
        return targets

    @torch.inference_mode()
    def decode(self, sources: list[list[int]], use_cache: bool = True) -> list[list[int]]:
        """Token ids of the targets, without the closing token, of sources read at once.

        Args:
            sources: Token ids.
            use_cache: Whether a source is computed once, or anew at every step.
        """
        model: Any = self.model
        writing = self.writing
        pad = self.tokenizer.pad_token_id
        end = end_token(self.tokenizer)
        longest = max(map(len, sources))
        ids = torch.tensor([[pad] * (longest - len(source)) + source for source in sources])
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sources])
        ids, mask = ids.to(model.device), mask.to(model.device)
        was_training = model.training
        model.eval()
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            source_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=writing.num_beams,
                length_penalty=writing.length_penalty if writing.num_beams > 1 else None,
                max_new_tokens=writing.max_length,
                min_new_tokens=writing.min_length or None,
                suppress_tokens=self._never_written,
                pad_token_id=pad,
                bos_token_id=self.tokenizer.cls_token_id,
                eos_token_id=end,
                use_cache=use_cache,
            ),
            logits_processor=LogitsProcessorList(self._rules(longest)),
        )
        model.train(was_training)
        return [
            [token for token in row if token not in (pad, end)]
            for row in written[:, longest:].tolist()
        ]

    @functools.cached_property
    def _never_written(self) -> list[int]:
        """Special tokens, and rows of the embeddings that stand for no token."""
        nothing = range(len(self.tokenizer), self.model.config.vocab_size)
        return sorted({*self.tokenizer.all_special_ids, *nothing} - {end_token(self.tokenizer)})

    def _rules(self, num_source: int) -> list[LogitsProcessor]:
        size = self.writing.no_repeat_ngram_size
        return [NoRepeatedNgrams(size, num_source, self._full_stops)] if size else []

    @functools.cached_property
    def _full_stops(self) -> set[int]:
        """Also those that begin a word (of RoBERTa and XLM-R) or go on with one (of BERT)."""
        vocabulary = self.tokenizer.get_vocab()
        return {number for token, number in vocabulary.items() if token.lstrip("Ġ▁#") == "."}


class NoRepeatedNgrams(LogitsProcessor):
    """Forbids the token that would end an n-gram which the target has already.

    As `--forbid_duplicate_ngrams --forbid_ignore_word "."` of s2s-ft: an n-gram in which an ignored
    token stands may come again. The library's own rule would forbid n-grams of the source too,
    which here stands before the target, so nothing could be copied.

    Args:
        size: Of an n-gram.
        num_source: Tokens before the target.
        ignored: Tokens whose n-grams may come again.
    """

    def __init__(self, size: int, num_source: int, ignored: set[int]) -> None:
        self._size, self._num_source, self._ignored = size, num_source, ignored

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, target in enumerate(input_ids[:, self._num_source :].tolist()):
            scores[row, self._forbidden(target)] = -torch.inf
        return scores

    def _forbidden(self, target: list[int]) -> list[int]:
        before = self._size - 1
        begun = target[len(target) - before :]
        if len(target) < self._size or not self._ignored.isdisjoint(begun):
            return []
        ends = {
            target[start + before]
            for start in range(len(target) - before)
            if target[start : start + before] == begun
        }
        return sorted(ends - self._ignored)


def end_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that closes a target.

    Raises:
        ExperimentError: The tokenizer has none, or no padding.
    """
    if tokenizer.sep_token_id is None or tokenizer.pad_token_id is None:
        raise ExperimentError(
            "the tokenizer has no [SEP] (sep_token) or no padding (pad_token), which generation"
            " needs: choose a model of the BERT, RoBERTa or XLM-R family"
        )
    return int(tokenizer.sep_token_id)


def encode_sources(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Source]:
    """Sources of at most `max_length` tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    encoded = backend.encode_batch(list(texts))
    backend.no_truncation()
    least = tokenizer.num_special_tokens_to_add(pair=False)
    return [
        Source(one.ids if len(one.ids) > least else [], bool(one.overflowing)) for one in encoded
    ]


def _by_length(sources: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Rows of like length, the longest first."""
    order = sorted(range(len(sources)), key=lambda row: (-len(sources[row]), row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
