"""Sentence embeddings scored as they are."""

import dataclasses

import numpy
import pytest
import torch
from datasets import Dataset
from scipy import stats
from test_finetune import make_encoder, make_tokenizer

from minilm_exp.errors import ExperimentError
from minilm_exp.settings import Runtime
from minilm_exp.task_settings import Task, TaskSettings
from minilm_exp.tasks.examples import Examples, TaskData
from minilm_exp.tasks.finetune import Finetuning
from minilm_exp.tasks.similarity import score_similarity

WORDS = [f"w{number}" for number in range(1, 9)]


def make_rows(number, seed):
    draw = numpy.random.default_rng(seed)

    def text():
        return " ".join(draw.choice(WORDS, draw.integers(1, 9)))

    columns = {"first": [text() for _ in range(number)], "second": [text() for _ in range(number)]}
    return columns | {"label": draw.random(number).tolist()}


@pytest.fixture
def job(tmp_path):
    def made(pooling="mean", number=30, max_length=16, test=False, **changes):
        validation = Examples(Dataset.from_dict(make_rows(number, 1)), f"v{number}")
        more = {"": Examples(Dataset.from_dict(make_rows(20, 2)), "t")} if test else {}
        task = Task(
            version=1, family="glue", kind="similarity", metrics=["spearman", "pearson"],
            score="spearman",
            text_columns=["a", "b"], pooling=pooling,
        )  # fmt: skip
        settings = TaskSettings(1, 8, 1e-3, 0.1, 0.0, 0.0, 0.0, max_length, None, None, None)
        data = TaskData(validation, {"": validation}, more, 1)
        runtime = Runtime("cpu", None, None, 0, False, "auto", "auto", 1.0, False)
        job = Finetuning("alike", task, data, settings, 1, "fp32", runtime, tmp_path)
        return dataclasses.replace(job, **changes)

    return made


def by_hand(encoder, tokenizer, rows, pooling, max_length=16):
    """One text at a time, so without padding."""
    similarities = []
    for first, second in zip(rows["first"], rows["second"]):
        vectors = []
        for text in (first, second):
            inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
            with torch.no_grad():
                states = encoder(**inputs).last_hidden_state[0].double().numpy()
            vectors.append(states[0] if pooling == "first_token" else states.mean(axis=0))
        a, b = vectors
        similarities.append(a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b))
    return similarities


@pytest.mark.parametrize("pooling", ["mean", "first_token"])
@pytest.mark.parametrize("max_length", [16, 5])
def test_scores_by_hand(job, pooling, max_length):
    """Padding in the mean, the texts as one pair, or dropout."""
    encoder, tokenizer = make_encoder(), make_tokenizer()
    encoder.train()
    given = job(pooling, max_length=max_length)
    scored = score_similarity(encoder, tokenizer, given)
    assert encoder.training
    rows = given.data.validation[""].rows[:]
    expected = by_hand(encoder.eval(), tokenizer, rows, pooling, max_length)
    assert scored.predictions[""] == pytest.approx(expected, abs=1e-5)
    assert scored.metrics["spearman"] == pytest.approx(
        stats.spearmanr(scored.predictions[""], rows["label"]).statistic
    )
    assert scored.metrics["pearson"] == pytest.approx(
        stats.pearsonr(expected, rows["label"]).statistic, abs=1e-4
    )


def test_parts_and_limits(job):
    """The test split under the validation split's name, or all of a large split."""
    given = job(test=True)
    limited = dataclasses.replace(given.settings, max_validation_examples=7)
    scored = score_similarity(
        make_encoder(), make_tokenizer(), dataclasses.replace(given, settings=limited)
    )
    assert {part: len(values) for part, values in scored.predictions.items()} == {"": 7, "test": 7}
    assert set(scored.metrics) == {"spearman", "pearson", "test_spearman", "test_pearson"}


def test_embeddings_that_are_not_finite_are_refused(job):
    """A score of a broken model."""
    encoder = make_encoder()
    with torch.no_grad():
        next(iter(encoder.parameters())).fill_(float("nan"))
    with pytest.raises(ExperimentError, match=r"alike.*not finite"):
        score_similarity(encoder, make_tokenizer(), job())
