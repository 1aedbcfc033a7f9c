"""Scores of texts that were written beside those that should have been, as fractions of 1.

Letter case never counts, because the papers' models write in lower case.
"""

from __future__ import annotations

import functools
import logging
import statistics
from typing import Any

import nltk
import sacrebleu
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

_log = logging.getLogger(__name__)
_ROUGE = ("rouge1", "rouge2", "rougeL")


def text_scores(names: list[str], references: list[str], texts: list[str]) -> dict[str, float]:
    """The scores that can be computed here, of the names asked for.

    - rouge1, rouge2, rougeL: mean F1 of rouge-score with Porter's stemmer. rougeL takes a text as
      one sequence; rouge-score's rougeLsum, the ROUGE-L of papers on CNN/DailyMail, goes by line.
    - bleu4: sacrebleu's corpus BLEU, lower-cased, with its own tokenisation (13a).
    - meteor: mean of nltk's METEOR, which is the formula of 2005 with WordNet's synonyms. It is
      absent where there is no WordNet.
    """
    scores: dict[str, float] = {}
    wanted = [name for name in names if name in _ROUGE]
    if wanted:
        scorer = RougeScorer(wanted, tokenizer=DefaultTokenizer(use_stemmer=True))
        found = [scorer.score(reference, text) for reference, text in zip(references, texts)]
        scores |= {
            name: statistics.fmean(float(one[name].fmeasure) for one in found) for name in wanted
        }
    if "bleu4" in names:
        scores["bleu4"] = sacrebleu.corpus_bleu(texts, [references], lowercase=True).score / 100
    if "meteor" in names and has_wordnet():
        split = NLTKWordTokenizer().tokenize
        scores["meteor"] = statistics.fmean(
            meteor_score([split(reference)], split(text))
            for reference, text in zip(references, texts)
        )
    return {name: scores[name] for name in names if name in scores}


@functools.cache
def has_wordnet() -> bool:
    """Whether nltk finds WordNet; says so once where it does not."""
    try:
        wordnet: Any = nltk.corpus.wordnet
        wordnet.ensure_loaded()
    except (LookupError, OSError):
        _log.warning(
            "METEOR is left out: nltk finds no WordNet; get it with python -m nltk.downloader"
            " wordnet, or see docs/generation.md"
        )
        return False
    return True
