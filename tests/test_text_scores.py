"""Scores of written texts beside the libraries called by hand."""

import logging
import re
import statistics
from pathlib import Path

import nltk
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from minilm_exp.task_settings import METRICS
from minilm_exp.tasks import text_scores as module
from minilm_exp.tasks.text_scores import has_wordnet, text_scores

REFERENCES = ["The cats sat on the mat .", "who is running the show ?", "in 1066 , again"]
TEXTS = ["the cat sits on a mat.", "Who runs the show?", "", ]  # fmt: skip


@pytest.fixture
def no_wordnet(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk.corpus, "wordnet", nltk.corpus.util.LazyCorpusLoader(
        "no_wordnet_at_all", nltk.corpus.WordNetCorpusReader, None))  # fmt: skip
    has_wordnet.cache_clear()
    yield
    has_wordnet.cache_clear()


def test_rouge_is_the_mean_f1_of_the_library():
    """Recall for F1, no stemming, or a target and an output that change places."""
    found = text_scores(["rouge1", "rouge2", "rougeL"], REFERENCES, TEXTS)
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name], use_stemmer=True)
        by_hand = [scorer.score(r, t)[name].fmeasure for r, t in zip(REFERENCES, TEXTS)]
        assert found[name] == pytest.approx(statistics.fmean(by_hand), abs=1e-12)
    # "cats" is "cat", "running" is "runs"; of six and six words five agree in the first.
    assert RougeScorer(["rouge1"], use_stemmer=True).score(REFERENCES[1], TEXTS[1])[
        "rouge1"
    ].fmeasure == pytest.approx(2 * (4 / 4) * (4 / 5) / (4 / 4 + 4 / 5))


def test_bleu_is_that_of_the_library_whatever_the_case():
    """A mean of sentences, or an uncased model that is scored on capitals."""
    references, texts = ["A b c d e f .", "G h i j k"], ["a b c d e g .", "g h i j k"]
    found = text_scores(["bleu4"], references, texts)["bleu4"]
    by_hand = sacrebleu.corpus_bleu(
        [text.lower() for text in texts], [[reference.lower() for reference in references]]
    )
    assert found == pytest.approx(by_hand.score / 100, abs=1e-12)
    assert 0.5 < found < 1
    assert text_scores(["bleu4"], references, references)["bleu4"] == pytest.approx(1)


def test_texts_that_agree_score_one():
    """Percent for fractions."""
    names = ["rouge1", "rouge2", "rougeL", "bleu4"]
    found = text_scores(names, REFERENCES[:2], REFERENCES[:2])
    assert found == pytest.approx(dict.fromkeys(names, 1.0))
    assert list(found) == names


def test_nothing_written_scores_nothing():
    """A division by no words."""
    assert text_scores(["rouge1", "rougeL", "bleu4"], ["a b"], [""]) == {
        "rouge1": 0, "rougeL": 0, "bleu4": 0,
    }  # fmt: skip


def test_meteor_without_wordnet_is_absent_and_said_once(no_wordnet, caplog):
    """A zero that stands in a table as if it had been measured."""
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert set(text_scores(["meteor", "bleu4"], REFERENCES, TEXTS)) == {"bleu4"}
    assert len(re.findall("METEOR is left out", caplog.text)) == 1


def test_meteor_is_that_of_the_library(monkeypatch):
    """Texts that are not split into words, or a target and an output that change places."""
    monkeypatch.setattr(module, "has_wordnet", lambda: True)
    monkeypatch.setattr(module, "meteor_score", lambda references, text: (references, text)[1:])
    monkeypatch.setattr(module.statistics, "fmean", list)
    found = text_scores(["meteor"], ["What's it, then?"], ["it's that."])
    assert found["meteor"] == [(["it", "'s", "that", "."],)]
    monkeypatch.undo()
    if not has_wordnet():
        return
    synonym = text_scores(["meteor"], ["the dog sleeps"], ["the hound sleeps"])
    assert (
        synonym["meteor"] > text_scores(["meteor"], ["the dog sleeps"], ["the x sleeps"])["meteor"]
    )


def test_every_metric_of_the_kind_has_its_function():
    """A metric that the config allows and nobody computes."""
    known = {*METRICS["generation"]}
    found = set(text_scores([*known], REFERENCES, TEXTS))
    assert known - found <= {"meteor"}
    assert Path(module.__file__).name == "text_scores.py"
