"""Extractive question answering: the answer is a span of the context, or there is none.

Source: BERT, arXiv:1810.04805, sections 4.2 and 4.3; what they leave open is taken from its
run_squad.py (github.com/google-research/bert) and from transformers' run_qa.py and utils_qa.py
(examples/pytorch/question-answering). Question and context make one sequence, the question first.
A long context is cut into windows, each behind the same question. Where the two scripts differ:

- Both call 128 tokens the stride. It is the step between windows in BERT's and their overlap in
  transformers', which current fine-tuning uses and which is meant here.
- A question is cut after 64 tokens, as BERT's does; leading blanks go first, as in transformers'.
- Any window may give the answer, as in transformers'. BERT's lets a token open an answer only in
  the window with the most context around it.

Characters are those of Python strings, as in SQuAD's answer_start.
"""

from __future__ import annotations

import bisect
import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy
from transformers import BatchEncoding, PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError

# BERT's choice.
MAX_QUESTION_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """What was found in a context.

    Attributes:
        text: Characters of the context without blanks at their ends, or "" for no answer.
        null_score: Score of no answer minus score of the best span; the larger, the less
            answerable.
    """

    text: str
    null_score: float


def encode_training_windows(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int, stride: int
) -> dict[str, list[Any]]:
    """Windows of several examples, each labelled with the tokens of the answer.

    The first gold answer is trained on, in whole tokens where it begins or ends inside one. A text
    that does not stand at its answer_start, which is often off by a few characters, is taken where
    it occurs nearest; an example whose context does not hold it at all gives no window. A window
    that does not hold the whole answer is labelled with its CLS token twice, and so is every
    window of a question without gold answers, or with a blank one. Without a CLS token, that label
    is 0.

    Args:
        batch: Columns question, context and answers, as in SQuAD.
        tokenizer: Of the encoder that is fine-tuned.
        max_length: Most tokens of a window, special tokens included.
        stride: Tokens that neighbouring windows of a context share.

    Returns:
        Columns input_ids, token_type_ids if the tokenizer makes them, start_positions and
        end_positions; a row is a window, without padding. There may be more or fewer rows than
        examples.

    Raises:
        ExperimentError: Windows are too short for their overlap.
    """
    encoded = _encode(batch, tokenizer, max_length, stride)
    sources = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    answers = [
        _find_answer(golds, context) for golds, context in zip(batch["answers"], batch["context"])
    ]
    rows = []
    for window, source in enumerate(sources):
        answer = answers[source]
        if answer is None:
            continue
        row = {name: column[window] for name, column in encoded.items()}
        context = batch["context"][source]
        span = _answer_tokens(answer, context, offsets[window], _context_tokens(encoded, window))
        if span is None:
            ids, first_token = row["input_ids"], tokenizer.cls_token_id
            null = ids.index(first_token) if first_token in ids else 0
            span = null, null
        row["start_positions"], row["end_positions"] = span
        rows.append(row)
    names = (*encoded, "start_positions", "end_positions")
    return {name: [row[name] for row in rows] for name in names}


def encode_evaluation_windows(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    stride: int,
) -> dict[str, list[Any]]:
    """Windows of several examples, with what `best_answers` needs to read answers from logits.

    Args:
        batch: Columns question and context.
        indices: Number of each example in the whole data.
        tokenizer: Of the encoder that is scored.
        max_length: Most tokens of a window, special tokens included.
        stride: Tokens that neighbouring windows of a context share.

    Returns:
        Columns input_ids, token_type_ids if the tokenizer makes them, example (its number) and
        offsets: for each token in turn, the character of the context where it begins and the one
        behind its end, or -1 and -1 outside the context. A row is a window, without padding.

    Raises:
        ExperimentError: Windows are too short for their overlap.
    """
    encoded = _encode(batch, tokenizer, max_length, stride)
    sources = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    columns = dict(encoded) | {"example": [indices[source] for source in sources], "offsets": []}
    for window, pairs in enumerate(offsets):
        context = _context_tokens(encoded, window)
        columns["offsets"].append(
            [
                *([-1, -1] * context.start),
                *itertools.chain.from_iterable(pairs[context.start : context.stop]),
                *([-1, -1] * (len(pairs) - context.stop)),
            ]
        )
    return columns


def best_answers(
    contexts: list[str],
    examples: Sequence[int],
    offsets: Sequence[Sequence[int]],
    start_logits: Sequence[numpy.ndarray],
    end_logits: Sequence[numpy.ndarray],
    *,
    may_be_empty: bool,
    null_threshold: float = 0.0,
    num_best: int = 20,
    max_answer_tokens: int = 30,
) -> list[Answer]:
    """Reads one answer for each context from the logits of all its windows.

    A span scores the sum of its start and end logit. Of each window, the `num_best` best starts
    are paired with the `num_best` best ends; tokens outside the context do not count among them
    (in BERT's and transformers' scripts they do), and a span of blanks alone is none. Of equal
    spans the earlier window's is taken, then the one that starts earlier, then the shorter one.

    No answer scores the sum of both logits of a window's first token, where BERT and its kin have
    their CLS token; of several windows, the lowest counts. Where no window has a span, the text is
    empty, and the lowest start and end logit of a window stand in for the missing best span, so
    that null_score stays finite.

    Args:
        contexts: Of all examples, by their number.
        examples: Number of the example of each window.
        offsets: As `encode_evaluation_windows` gives them, for each window.
        start_logits: For each window, as many as it has tokens, without padding.
        end_logits: The same.
        may_be_empty: Whether a question may be left without an answer, as in SQuAD 2.0.
        null_threshold: It is left so where null_score is above this.
        num_best: Starts, and ends, that are tried in each window.
        max_answer_tokens: Tokens of the longest answer.

    Raises:
        ExperimentError: Logits are not finite.
        ValueError: Logits are not as many as tokens, or a context has no window.
    """
    null_scores = [math.inf] * len(contexts)
    spans = [("", -math.inf)] * len(contexts)
    windows = zip(examples, offsets, start_logits, end_logits, strict=True)
    for example, flat, start_values, end_values in windows:
        characters = numpy.asarray(flat).reshape(-1, 2)
        # Sums of half precision would make ties of what is none.
        start = numpy.asarray(start_values, dtype=numpy.float64)
        end = numpy.asarray(end_values, dtype=numpy.float64)
        if not start.shape == end.shape == characters.shape[:1]:
            raise ValueError(
                f"a window of {len(characters)} tokens with logits of shape {start.shape} and"
                f" {end.shape}; cut off their padding"
            )
        if not (numpy.isfinite(start).all() and numpy.isfinite(end).all()):
            raise ExperimentError(
                f"question answering gives logits that are not finite, for example in context"
                f" {example}: lower task_training.learning_rate"
            )
        null_scores[example] = min(null_scores[example], float(start[0] + end[0]))
        text, score = _best_span(
            contexts[example], characters, start, end, num_best, max_answer_tokens
        )
        best_text, best_score = spans[example]
        if (text != "", score) > (best_text != "", best_score):
            spans[example] = text, score
    if math.inf in null_scores:
        raise ValueError(f"context {null_scores.index(math.inf)} has no window")
    answers = []
    for (text, score), no_answer in zip(spans, null_scores):
        is_empty = may_be_empty and no_answer - score > null_threshold
        answers.append(Answer("" if is_empty else text, no_answer - score))
    return answers


def _encode(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int, stride: int
) -> BatchEncoding:
    questions = [question.lstrip() for question in batch["question"]]
    tokens = _tokens(questions, tokenizer)
    if max(map(len, tokens)) > MAX_QUESTION_TOKENS:
        questions = [_cut(question, spans) for question, spans in zip(questions, tokens)]
        tokens = _tokens(questions, tokenizer)
    longest = max(map(len, tokens))
    room = max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= stride:
        raise ExperimentError(
            f"task_training.max_length={max_length} leaves {room} tokens for the context, next to a"
            f" question of {longest} tokens; windows that share task_training.doc_stride={stride}"
            f" tokens need {stride + 1} at least: raise the one or lower the other"
        )
    return tokenizer(
        questions,
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[tuple[int, int]]]:
    """Begin and end of each token of each text, without special tokens."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["offset_mapping"]


def _cut(question: str, tokens: list[tuple[int, int]]) -> str:
    if len(tokens) <= MAX_QUESTION_TOKENS:
        return question
    # A blank at the end could be a token of its own.
    return question[: tokens[MAX_QUESTION_TOKENS][0]].rstrip()


def _context_tokens(encoded: BatchEncoding, window: int) -> range:
    """Which tokens of a window are the context's."""
    sequences = encoded.sequence_ids(window)
    number = sequences.count(1)
    first = sequences.index(1) if number else len(sequences)
    return range(first, first + number)


def _find_answer(golds: dict[str, list[Any]], context: str) -> tuple[int, int] | None:
    """Begin and end of the first gold answer; (0, 0) for no answer, None if it is not there."""
    text = golds["text"][0] if golds["text"] else ""
    answer = text.strip()
    if not answer:
        return 0, 0
    expected = max(0, golds["answer_start"][0] + text.index(answer))
    occurrences = [
        context.rfind(answer, 0, expected + len(answer)),  # the last one up to there
        context.find(answer, expected),
    ]
    begins = [begin for begin in occurrences if begin >= 0]
    if not begins:
        return None
    begin = min(begins, key=lambda begin: abs(begin - expected))
    return begin, begin + len(answer)


def _answer_tokens(
    answer: tuple[int, int], context: str, offsets: list[tuple[int, int]], tokens: range
) -> tuple[int, int] | None:
    """First and last token with characters of the answer, if the window holds it whole."""
    begin, end = answer
    if not tokens or offsets[tokens[0]][0] > begin:
        return None
    if _behind_marks(context, offsets[tokens[-1]][1]) < end:
        return None
    among = {"lo": tokens.start, "hi": tokens.stop}
    first = bisect.bisect_right(offsets, begin, **among, key=itemgetter(1))
    last = bisect.bisect_left(offsets, end, **among, key=itemgetter(0)) - 1
    return (first, last) if first <= last else None


def _behind_marks(context: str, end: int) -> int:
    """The end of a token, moved behind the accents and vowel signs that belong to its last letter.

    Tokenizers of uncased models drop them, and their offsets leave them out: without this, most
    answers in Hindi that end with a vowel sign would lose it.
    """
    while end < len(context) and unicodedata.category(context[end]).startswith("M"):
        end += 1
    return end


def _best_span(
    context: str,
    characters: numpy.ndarray,
    start: numpy.ndarray,
    end: numpy.ndarray,
    num_best: int,
    max_answer_tokens: int,
) -> tuple[str, float]:
    """Text and score of a window's best span; "" and its lowest logits if it has none."""
    tokens = numpy.flatnonzero(characters[:, 0] >= 0)
    # Stable, and sorted by position afterwards, so that argmax takes the first of equal spans.
    firsts = numpy.sort(tokens[numpy.argsort(-start[tokens], kind="stable")[:num_best]])[:, None]
    lasts = numpy.sort(tokens[numpy.argsort(-end[tokens], kind="stable")[:num_best]])
    is_span = (lasts >= firsts) & (lasts < firsts + max_answer_tokens)
    scores = numpy.where(is_span, start[firsts] + end[lasts], -math.inf)
    while scores.max(initial=-math.inf) > -math.inf:
        first, last = divmod(int(scores.argmax()), len(lasts))
        begin = characters[firsts[first, 0], 0]
        text = context[begin : _behind_marks(context, characters[lasts[last], 1])].strip()
        if text:
            return text, float(scores[first, last])
        scores[first, last] = -math.inf
    return "", float(start.min() + end.min())
