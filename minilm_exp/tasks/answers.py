"""Scores of extractive question answering, as the official scripts of SQuAD and MLQA count them.

Sources: evaluate-v1.1.py and evaluate-v2.0.py of https://rajpurkar.github.io/SQuAD-explorer, and
mlqa_evaluation_v1.py of facebookresearch/MLQA, commit 5ef5c73.

All scores are fractions between 0 and 1, where the scripts print percentages. Lists are parallel,
with one entry a question; error messages count questions from 1. A question may have several gold
answers, and the best score over them counts. Every question has a prediction: where the scripts
give 0 to one that is missing, "" stands here and is compared like any other text.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

from minilm_exp.errors import ExperimentError

_NO_ARTICLES = r"(?!)"  # a pattern that matches nothing

# Articles by language, as MLQA has them. The Arabic one is alef and lam. The first branch of its
# pattern never matches, since nothing comes before the start of a text; the second takes it out
# wherever it stands, also within a word.
_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "hi": _NO_ARTICLES,
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"\s\u0627\u0644^|\u0627\u0644",
    "zh": _NO_ARTICLES,
}


def squad_scores(predictions: list[str], golds: list[list[str]]) -> dict[str, float]:
    """Exact match and F1 of SQuAD 1.1.

    Texts are compared in lower case, without ASCII punctuation and English articles. F1 counts the
    words that two texts share, each as often as both have it. As in the script, F1 is 0 where none
    is shared, even if nothing is left of either text and exact match is 1.

    Args:
        predictions: A text for every question.
        golds: Its gold answers, at least one.

    Raises:
        ExperimentError: No questions, or one without gold answers.
        ValueError: The lists differ in length.
    """
    return _answerable_scores(predictions, golds, _squad_words)


def mlqa_scores(predictions: list[str], golds: list[list[str]], language: str) -> dict[str, float]:
    """Exact match and F1 of MLQA: those of SQuAD 1.1, with rules for the language of the answers.

    All punctuation of Unicode is removed, and the articles where a language has them. In Chinese
    every character from U+4E00 to U+9FA5 is a word, and what stands between them is split at
    whitespace.

    Args:
        predictions: A text for every question.
        golds: Its gold answers, at least one.
        language: en, es, hi, vi, de, ar or zh.

    Raises:
        ExperimentError: Another language, no questions, or one without gold answers.
        ValueError: The lists differ in length.
    """
    if language not in _ARTICLES:
        raise ExperimentError(
            f"answers in language {language!r} cannot be scored: MLQA has rules for"
            f" {', '.join(_ARTICLES)} only; choose one of these"
        )
    return _answerable_scores(predictions, golds, lambda text: _mlqa_words(text, language))


def squad_v2_scores(
    predictions: list[str], golds: list[list[str]], null_scores: list[float]
) -> dict[str, float]:
    """Exact match and F1 of SQuAD 2.0, and the best of both that a threshold gives.

    Gold answers of which normalisation leaves nothing do not count. Where none remains, a
    prediction of which nothing is left is right; F1 then equals exact match.

    `exact_match` and `f1` take the predictions as they are. Their parts over the questions with
    gold answers (`has_answer_`, even if none counts) and over those without (`no_answer_`) are
    absent where there are no such questions. For `best_exact_match` and `best_f1`, questions with
    a null score above the best threshold are left unanswered. The search for it is the script's:
        - All questions are unanswered at first, and the threshold is 0.0, which need not be below
          the null scores. Then they are answered one by one, the lowest null score first and equal
          ones in the order of the questions. The first maximum wins, even if it lies between equal
          null scores, where no threshold can divide.
        - Unanswered, a question counts 1 if it has no gold answers and 0 otherwise. Answered, one
          without gold answers counts 0 unless its prediction is ""; it is not enough that
          normalisation leaves nothing of it.

    Args:
        predictions: A text for every question, "" for no answer.
        golds: Its gold answers, none if it is unanswerable.
        null_scores: Finite numbers on any scale, larger where no answer is more likely.

    Returns:
        The scores, and `best_exact_match_threshold` and `best_f1_threshold` on the scale of
        `null_scores`.

    Raises:
        ExperimentError: No questions, or a null score that is not finite.
        ValueError: The lists differ in length.
    """
    _check_lists(predictions, golds, null_scores)
    for number, null_score in enumerate(null_scores, 1):
        if not math.isfinite(null_score):
            raise ExperimentError(
                f"the null score of question {number} is {null_score}, but a threshold needs"
                " finite ones: lower task_training.learning_rate"
            )
    exact_match, f1 = [], []
    for prediction, answers in zip(predictions, golds):
        predicted = _squad_words(prediction)
        counted = [words for words in map(_squad_words, answers) if words] or [[]]
        exact_match.append(float(predicted in counted))
        f1.append(max(exact_match[-1], _best_f1(predicted, counted)))
    scores = {"exact_match": _mean(exact_match), "f1": _mean(f1)}
    for prefix, has_answer in (("has_answer", True), ("no_answer", False)):
        chosen = [i for i, answers in enumerate(golds) if bool(answers) == has_answer]
        if chosen:
            scores[f"{prefix}_exact_match"] = _mean([exact_match[i] for i in chosen])
            scores[f"{prefix}_f1"] = _mean([f1[i] for i in chosen])
    num_unanswerable = sum(not answers for answers in golds)
    order = sorted(range(len(golds)), key=null_scores.__getitem__)
    for name, values in (("best_exact_match", exact_match), ("best_f1", f1)):
        gains = (values[i] if golds[i] else -float(predictions[i] != "") for i in order)
        totals = list(accumulate(gains, initial=float(num_unanswerable)))
        num_answered = max(range(len(totals)), key=totals.__getitem__)
        scores[name] = totals[num_answered] / len(golds)
        scores[f"{name}_threshold"] = null_scores[order[num_answered - 1]] if num_answered else 0.0
    return scores


def _answerable_scores(
    predictions: list[str], golds: list[list[str]], words_of: Callable[[str], list[str]]
) -> dict[str, float]:
    _check_lists(predictions, golds)
    for number, answers in enumerate(golds, 1):
        if not answers:
            raise ExperimentError(
                f"question {number} of {len(golds)} has no gold answer; only SQuAD 2.0 scores"
                " unanswerable questions: leave it out or score the task as SQuAD 2.0"
            )
    exact_match, f1 = [], []
    for prediction, answers in zip(predictions, golds):
        predicted = words_of(prediction)
        counted = [words_of(answer) for answer in answers]
        exact_match.append(float(predicted in counted))
        f1.append(_best_f1(predicted, counted))
    return {"exact_match": _mean(exact_match), "f1": _mean(f1)}


def _best_f1(predicted: list[str], golds: list[list[str]]) -> float:
    return max(_f1(predicted, gold) for gold in golds)


def _f1(predicted: list[str], gold: list[str]) -> float:
    num_shared = (Counter(predicted) & Counter(gold)).total()
    if num_shared == 0:
        return 0.0
    # In the scripts' order of operations, since last digits decide between thresholds.
    precision, recall = num_shared / len(predicted), num_shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def _squad_words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(_ARTICLES["en"], " ", kept).split()


def _mlqa_words(text: str, language: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if not _is_punctuation(letter))
    kept = re.sub(_ARTICLES[language], " ", kept)
    if language == "zh":
        kept = re.sub(r"([\u4e00-\u9fa5])", r" \1 ", kept)
    return kept.split()


def _is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _check_lists(*lists: list) -> None:
    lengths = [len(entries) for entries in lists]
    if len(set(lengths)) > 1:
        raise ValueError(f"lists with one entry a question differ in length: {lengths}")
    if lengths[0] == 0:
        raise ExperimentError("there are no questions to score: give the task at least one")
