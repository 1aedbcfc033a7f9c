"""Fine-tuning of tiny random encoders on made-up texts: pairs, numbers and answers."""

import copy
import dataclasses
import json
import random
import statistics

import numpy
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from minilm_exp.errors import ExperimentError
from minilm_exp.objective_settings import Objective, parse_terms
from minilm_exp.parsing import parse
from minilm_exp.provenance import fingerprint_text
from minilm_exp.task_settings import Task, TaskSettings
from minilm_exp.tasks import finetune as finetune_module
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import Examples, TaskData
from minilm_exp.tasks.finetune import (
    Finetuning,
    Guide,
    finetune,
    load_finetuned,
    predict,
    with_head,
)

WORDS = [f"w{number}" for number in range(20)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
ARCHITECTURES = ["bert", "distilbert", "roberta"]
MAX_LENGTH = 20
KINDS = {
    "classification": {"metrics": ["accuracy"], "score": "accuracy"},
    "regression": {"metrics": ["pearson"], "score": "pearson"},
    "spans": {"metrics": ["squad"], "score": "f1"},
}


def make_tokenizer(architecture="bert"):
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # RoBERTa has one token type, BERT two.
    kind = 0 if architecture == "roberta" else 1
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{kind} [SEP]:{kind}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask", *["token_type_ids"] * (kind == 1)],
    )


def make_encoder(architecture="bert", seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(SPECIAL) + len(WORDS), "initializer_range": 0.2, "pad_token_id": 0}
    if architecture == "distilbert":
        config = DistilBertConfig(
            dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=24, **sizes
        )
        return DistilBertModel(config)
    sizes |= {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 24,
    }
    if architecture == "roberta":
        return RobertaModel(RobertaConfig(type_vocab_size=1, **sizes))
    return BertModel(BertConfig(**sizes))


def make_examples(rows):
    return Examples(Dataset.from_list(rows), fingerprint_text(repr(rows)))


def make_data(num_train=24, num_validation=16, labels=(0, 1), convert=int):
    """The first word of the first text is the label; the rest is noise of several lengths."""
    draw = random.Random(1)

    def example(index):
        label = labels[index % len(labels)]
        noise = [" ".join(draw.choices(WORDS[5:], k=draw.randint(1, 6))) for _ in range(2)]
        first = f"{WORDS[label]} {noise[0]}"
        return {"first": first, "second": noise[1], "label": convert(label)}

    train = make_examples([example(i) for i in range(num_train)])
    validation = make_examples([example(i) for i in range(num_validation)])
    return TaskData(train, {"": validation}, {}, len(labels) if convert is int else 1)


def data_of(kind, **numbers):
    if kind == "spans":
        return make_questions(**numbers)
    return make_data(convert=float if kind == "regression" else int, **numbers)


def make_questions(num_train=24, num_validation=16, share_unanswerable=0.0):
    """The answer begins with w0 or w1 and ends with w2 or w3, with two blanks in between."""
    draw = random.Random(2)

    def question(index):
        words = draw.choices(WORDS[5:], k=draw.randint(6, 24))
        answers = {"text": [], "answer_start": []}
        if draw.random() >= share_unanswerable:
            text = f"{draw.choice(WORDS[:2])}  {draw.choice(WORDS[2:4])}"
            place = draw.randrange(len(words))
            words.insert(place, text)
            answers = {"text": [text], "answer_start": [len(" ".join([*words[:place], ""]))]}
        return {
            "id": f"q{index}",
            "question": " ".join(draw.choices(WORDS[5:], k=draw.randint(1, 3))),
            "context": " ".join(words),
            "answers": answers,
        }

    rows = [question(index) for index in range(num_train + num_validation)]
    for row in rows:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"]):
            assert row["context"][start:].startswith(text)
    validation = make_examples(rows[num_train:])
    return TaskData(make_examples(rows[:num_train]), {"": validation}, {}, 2)


def make_task(kind="classification", **changes):
    return Task(version=1, kind=kind, family="glue", **{**KINDS[kind], **changes})


def reordered(data, order):
    rows = data.validation[""].rows
    changed = make_examples([rows[index] for index in order])
    return dataclasses.replace(data, validation={"": changed})


@pytest.fixture(scope="module")
def runtime(compose_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unused")
    return parse(compose_config("experiment=smoke", f"outputs_dir={folder}")).runtime


@pytest.fixture
def make_job(runtime, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache of test_finetune"

    def made(data=None, *, task=None, seed=1, precision="fp32", microbatch=None, **training):
        settings = {
            "epochs": 2,
            "batch_size": 8,
            "learning_rate": 2e-4,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.0,
            "max_length": MAX_LENGTH,
            "doc_stride": 4,
        }
        return Finetuning(
            name="made up",
            task=task or make_task(),
            data=data or make_data(),
            settings=TaskSettings(**{**settings, **training}),
            seed=seed,
            precision=precision,
            runtime=dataclasses.replace(runtime, microbatch_size=microbatch),
            cache=cache,
        )

    return made


@pytest.fixture
def score(make_job):
    """Fine-tunes; gives the score and what was logged."""

    def scored(encoder, data=None, *, architecture="bert", keep_in=None, **job):
        logged = []
        result = finetune(
            encoder,
            make_tokenizer(architecture),
            make_job(data, **job),
            "a test",
            lambda metrics, step: logged.append((step, dict(metrics))),
            keep_in,
        )
        return result, logged

    return scored


@pytest.fixture
def first_weights(monkeypatch):
    """Weights and dropout of each model that is handed to the training loop."""
    seen = []

    class Recording(finetune_module._Trainer):
        def __init__(self, *, model, **arguments):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            dropout = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
            seen.append((state, model.base_model_prefix, dropout))
            super().__init__(model=model, **arguments)

    monkeypatch.setattr(finetune_module, "_Trainer", Recording)
    return seen


@pytest.fixture
def batches(monkeypatch):
    """Token ids of each row of each batch that is trained on."""
    seen = []

    class Recording(finetune_module.Collator):
        def __call__(self, rows):
            seen.append([tuple(row["input_ids"]) for row in rows])
            return super().__call__(rows)

    monkeypatch.setattr(finetune_module, "Collator", Recording)
    return seen


@pytest.fixture
def all_logits(monkeypatch):
    """Logits of each evaluation."""
    seen = []

    def recording(*arguments):
        seen.append(predict(*arguments))
        return seen[-1]

    monkeypatch.setattr(finetune_module, "predict", recording)
    return seen


@pytest.fixture
def given_scores(monkeypatch):
    """Sets what each evaluation scores; gives the predictions that were to be scored."""

    def given(*scores):
        remaining, predictions = list(scores), []

        def scoring(name, task, part, examples, found):
            predictions.append(found)
            values = remaining.pop(0)
            return values if isinstance(values, dict) else {"accuracy": values}

        monkeypatch.setattr(finetune_module, "score_part", scoring)
        return predictions

    return given


def ids_of(examples, tokenizer):
    """Token ids of pairs, as the tokenizer alone gives them."""
    rows = examples.rows
    return [tuple(ids) for ids in tokenizer(rows["first"][:], rows["second"][:]).input_ids]


# What is trained


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoder_is_not_changed(score, architecture):
    """The encoder itself is trained, so the saved student or the teacher is another one after."""
    encoder = make_encoder(architecture).eval().requires_grad_(False)
    weights, config = copy.deepcopy(encoder.state_dict()), encoder.config.to_dict()
    score(encoder, architecture=architecture)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in encoder.state_dict().items())
    assert encoder.config.to_dict() == config
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", ["classification", "spans"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_starts_from_the_encoder(score, first_weights, architecture, kind):
    """Names do not fit and nothing is copied, which a lenient loader does not say."""
    encoder = make_encoder(architecture)
    data = data_of(kind, num_train=8, num_validation=8)
    score(encoder, data, architecture=architecture, task=make_task(kind), epochs=1)
    [(state, prefix, _)] = first_weights
    copied = {
        name: torch.equal(tensor, state[f"{prefix}.{name}"])
        for name, tensor in encoder.state_dict().items()
        if f"{prefix}.{name}" in state
    }
    assert all(copied.values())
    assert {n for n in encoder.state_dict() if "pooler" not in n} <= set(copied)


@pytest.mark.parametrize("kind", ["classification", "spans"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoders_of_one_architecture_are_treated_alike(
    score, first_weights, batches, architecture, kind
):
    """Head or order hang on what was drawn before, so a comparison of two students is luck."""
    job = {"architecture": architecture, "task": make_task(kind)}
    data = data_of(kind)
    score(make_encoder(architecture, seed=0), data, **job)
    first_batches, batches[:] = batches[:], []
    torch.rand(17)
    random.random()
    numpy.random.rand(2)
    score(make_encoder(architecture, seed=1), data, **job)
    (one, prefix, _), (two, _, _) = first_weights
    head = [name for name in one if not name.startswith(f"{prefix}.")]
    assert head
    assert all(torch.equal(one[name], two[name]) for name in head)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert first_batches == batches


def test_head_follows_the_seed(score, first_weights):
    """The head is the same for every seed, and the spread over seeds too small."""
    for seed in (1, 2):
        score(make_encoder(), seed=seed)
    (one, _, _), (two, _, _) = first_weights
    assert not torch.equal(one["classifier.weight"], two["classifier.weight"])


def test_dropout_is_that_of_the_task(score, first_weights):
    """Fine-tuning runs with the dropout of distillation, which is mostly zero."""
    encoder = make_encoder()
    encoder.config.hidden_dropout_prob = encoder.config.attention_probs_dropout_prob = 0.0
    score(encoder, hidden_dropout=0.25, attention_dropout=0.25)
    assert first_weights[0][2] == {0.25}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_seed_gives_equal_predictions(score, architecture):
    """Order of the examples, dropout or head is drawn from a generator that no seed sets."""
    encoder = make_encoder(architecture)
    job = {"architecture": architecture, "batch_size": 4}  # 12 steps, so losses are logged too
    one = score(encoder, **job)
    torch.rand(5)
    assert score(encoder, **job) == one
    assert score(encoder, seed=2, **job)[1] != one[1]


def test_order_follows_seed_and_epoch(score, batches):
    """Every epoch, or every seed, in the same order; or examples that are seen twice or never."""
    data = make_data(num_train=25)
    orders = []
    for seed in (1, 2):
        score(make_encoder(), data, seed=seed, epochs=2)
        rows = [row for batch in batches for row in batch]
        batches.clear()
        assert len(rows) == 50
        orders += [rows[:25], rows[25:]]
    expected = sorted(ids_of(data.train, make_tokenizer()))
    assert all(sorted(order) == expected for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_learning_rate_warms_up_and_decays(score, monkeypatch):
    """The ratio is taken for a number of steps, or the schedule of another length."""
    rates = []

    class Recording(finetune_module._Trainer):
        def training_step(self, *arguments, **named):
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*arguments, **named)

    monkeypatch.setattr(finetune_module, "_Trainer", Recording)
    data = make_data(num_train=40)
    score(make_encoder(), data, epochs=4, learning_rate=1e-3, warmup_ratio=0.25)
    up = [1e-3 * step / 5 for step in range(5)]
    down = [1e-3 * (20 - step) / 15 for step in range(5, 20)]
    assert rates == pytest.approx(up + down)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_equal_whole_batches(score, all_logits, kind):
    """Gradients that are summed; or a short last micro-batch, or its padding, that counts more."""
    data = data_of(kind, num_train=14, num_validation=8)
    losses, logits = [], []
    # gcd(8, 6) is 2. The last batch of 14 pairs has 6, so 4 and 2.
    for microbatch in (None, 4, 6):
        _, logged = score(
            make_encoder(),
            data,
            microbatch=microbatch,
            task=make_task(kind),
            epochs=5,
            learning_rate=3e-3,
            hidden_dropout=0.0,
            weight_decay=0.0,
        )
        losses.append([metrics["loss"] for _, metrics in logged if "loss" in metrics])
        # The same number added to all of a window's logits changes nothing; Adam drifts there.
        shifts = [row.mean(axis=0) if kind == "spans" else 0.0 for row in all_logits[-1]]
        logits.append([row - shift for row, shift in zip(all_logits[-1], shifts)])
    assert losses[0]
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-4)
        for found, expected in zip(logits[other], logits[0], strict=True):
            numpy.testing.assert_allclose(found, expected, atol=1e-3)


# What it learns


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_separable_task_is_learnt(score, architecture):
    """Labels and texts get out of step, or the head is not trained; the margin is wide."""
    result, _ = score(
        make_encoder(architecture),
        make_data(num_train=96, num_validation=32),
        architecture=architecture,
        epochs=12,
        batch_size=16,
        learning_rate=5e-3,
        hidden_dropout=0.0,
    )
    assert result.metrics["accuracy"] >= 0.9


def test_three_classes(score):
    """The head has two classes whatever the labels."""
    data = make_data(num_train=96, num_validation=30, labels=(0, 1, 2))
    result, _ = score(
        make_encoder(), data, epochs=12, batch_size=16, learning_rate=5e-3, hidden_dropout=0.0
    )
    assert set(result.predictions[""]) == {0, 1, 2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numbers_are_learnt_and_not_rounded(score, precision):
    """Trained as classes; or bf16 logits, which between 2 and 4 are multiples of 1/64."""
    data = make_data(
        num_train=160,
        num_validation=40,
        labels=(0, 1, 2, 3, 4),
        convert=lambda label: 1.1 * label + 0.3,
    )
    result, _ = score(
        make_encoder(),
        data,
        task=make_task("regression", metrics=["pearson", "spearman"]),
        precision=precision,
        epochs=8,
        learning_rate=5e-3,
        batch_size=16,
        hidden_dropout=0.0,
    )
    assert result.metrics["pearson"] >= 0.9
    labels = data.validation[""].rows["label"][:]
    found = torch.tensor(result.predictions[""])
    # On the scale of the labels, not only in their order.
    assert statistics.fmean(result.predictions[""]) == pytest.approx(
        statistics.fmean(labels), abs=0.5
    )
    assert float((found - torch.tensor(labels)).abs().mean()) < 0.8
    rounded = found.bfloat16().float()
    assert (found != rounded).float().mean() > 0.8


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_answers_are_learnt_and_cut_out(score, architecture):
    """Labels off by a token, windows out of step with questions, or joined tokens for the text."""
    data = make_questions(num_train=160, num_validation=50)
    lengths = [len(row["context"].split()) for row in data.validation[""].rows]
    # Most contexts take several windows.
    assert max(lengths) > MAX_LENGTH > min(lengths)
    result, _ = score(
        make_encoder(architecture),
        data,
        architecture=architecture,
        task=make_task("spans"),
        epochs=8,
        batch_size=16,
        learning_rate=5e-3,
        hidden_dropout=0.0,
    )
    assert set(result.metrics) == {"exact_match", "f1"}
    assert result.metrics["exact_match"] >= 0.9
    right = [
        answer.text == row["answers"]["text"][0]
        for answer, row in zip(result.predictions[""], data.validation[""].rows)
    ]
    # With its two blanks, as it stands in the context; the metric alone would not see them.
    assert result.metrics["exact_match"] == sum(right) / 50
    for answer, row in zip(result.predictions[""], data.validation[""].rows):
        assert answer.text and answer.text in row["context"]


def test_unanswerable_questions_are_learnt(score):
    """An answer for every question, or a null score that says nothing."""
    data = make_questions(num_train=200, num_validation=60, share_unanswerable=0.4)
    result, _ = score(
        make_encoder(),
        data,
        task=make_task("spans", metrics=["squad_v2"]),
        epochs=6,
        batch_size=16,
        learning_rate=5e-3,
        hidden_dropout=0.0,
    )
    assert result.metrics["no_answer_exact_match"] >= 0.8
    assert result.metrics["has_answer_exact_match"] >= 0.8
    is_empty = {True: [], False: []}
    for answer in result.predictions[""]:
        is_empty[answer.text == ""].append(answer.null_score)
    assert min(is_empty[True]) > 0 >= max(is_empty[False])


def test_null_threshold_is_that_of_the_task(score):
    """A threshold of the config without effect."""
    data = make_questions(num_train=24, num_validation=10, share_unanswerable=0.3)
    texts = {}
    for threshold in (-1e6, 0.0, 1e6):
        task = make_task("spans", metrics=["squad_v2"], null_threshold=threshold)
        result, _ = score(make_encoder(), data, task=task, epochs=1)
        texts[threshold] = [answer.text for answer in result.predictions[""]]
    assert set(texts[-1e6]) == {""}
    assert "" not in texts[1e6]


# The best epoch


def assert_agrees(result, folder, tokenizer, make_job, data, logits):
    """The saved weights give the logits of that epoch and the predictions that were returned."""
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    job = make_job(data)
    part = encode(data.validation[""], "classification", False, tokenizer, job.settings, job.cache)
    again = predict(loaded, part, tokenizer, "fp32")
    numpy.testing.assert_allclose(numpy.stack(again), numpy.stack(logits), atol=1e-5)
    assert [int(row.argmax()) for row in again] == result.predictions[""]


@pytest.mark.parametrize(
    ("scores", "best_epoch"),
    [
        ([0.5, 0.9, 0.7], 2),
        ([0.9, 0.5, 0.7], 1),
        ([0.5, 0.7, 0.9], 3),
        ([0.5, 0.8, 0.8], 2),
        ([0.0, 0.0, 0.0], 1),
        ([-0.2, -0.1, -0.3], 2),
    ],
)
def test_best_epoch_is_kept(
    scores, best_epoch, score, given_scores, all_logits, make_job, tmp_path
):
    """The last weights under the best score, the later of equal ones, or a mix of two epochs."""
    data = make_data(num_train=40, num_validation=24)
    predictions = given_scores(*scores)
    result, logged = score(
        make_encoder(), data, epochs=3, learning_rate=1e-2, keep_in=tmp_path / "kept"
    )
    assert len(all_logits) == 3
    assert result.best_epoch == best_epoch
    assert result.metrics == {"accuracy": scores[best_epoch - 1]}
    assert result.epochs == [{"accuracy": value} for value in scores]
    assert [m["accuracy"] for _, m in logged if "accuracy" in m] == scores
    assert result.predictions == {"": predictions[best_epoch - 1]}
    # The epochs differ, or this would say nothing.
    first, second, third = (numpy.stack(logits) for logits in all_logits)
    assert min(abs(first - second).max(), abs(second - third).max()) > 1e-2
    tokenizer = make_tokenizer()
    logits = all_logits[best_epoch - 1]
    assert_agrees(result, tmp_path / "kept", tokenizer, make_job, data, logits)


def test_epoch_is_chosen_by_the_selected_value(score, given_scores):
    """A cross-lingual model chosen by the mean of languages where English chooses."""
    given_scores(
        {"accuracy": 0.9, "macro_f1": 0.1},
        {"accuracy": 0.5, "macro_f1": 0.3},
        {"accuracy": 0.7, "macro_f1": 0.2},
    )
    task = make_task(metrics=["accuracy", "macro_f1"], select="macro_f1")
    result, _ = score(make_encoder(), task=task, epochs=3)
    assert result.best_epoch == 2
    assert result.metrics == {"accuracy": 0.5, "macro_f1": 0.3}


def test_test_parts_are_scored_with_the_best_epoch(
    score, given_scores, all_logits, make_job, tmp_path
):
    """The test split scored with the last weights, or chosen by, or under another part's name."""
    data = make_data(num_train=40, num_validation=24)
    others = make_data(num_train=8, num_validation=30).validation[""]
    data = dataclasses.replace(data, test={"": others})
    predictions = given_scores(0.9, 0.5, 0.25)
    result, _ = score(make_encoder(), data, epochs=2, learning_rate=1e-2, keep_in=tmp_path / "kept")
    assert result.best_epoch == 1
    assert result.metrics == {"accuracy": 0.9, "test_accuracy": 0.25}
    assert result.predictions == {"": predictions[0], "test": predictions[2]}
    of_test = dataclasses.replace(data, validation={"": others})
    shown = dataclasses.replace(result, predictions={"": result.predictions["test"]})
    assert_agrees(shown, tmp_path / "kept", make_tokenizer(), make_job, of_test, all_logits[2])


def test_every_part_has_its_metrics_and_predictions(score):
    """Languages mixed up, or a mean over parts that is that of one."""
    data = make_data(num_validation=30)
    first, second = (data.validation[""].rows.select(range(*ends)) for ends in ((0, 10), (10, 30)))
    parts = {"en": make_examples(first.to_list()), "de": make_examples(second.to_list())}
    data = dataclasses.replace(data, validation=parts, test={"de": parts["de"]})
    task = make_task(score="accuracy_mean", select="accuracy_joint")
    result, _ = score(make_encoder(), data, task=task)
    assert list(result.predictions) == ["en", "de", "test_de"]
    right = {
        part: [p == row["label"] for p, row in zip(result.predictions[part], examples.rows)]
        for part, examples in parts.items()
    }
    means = {part: sum(values) / len(values) for part, values in right.items()}
    assert [len(values) for values in right.values()] == [10, 20]
    expected = {
        "accuracy_en": means["en"],
        "accuracy_de": means["de"],
        "accuracy_mean": (means["en"] + means["de"]) / 2,
        "accuracy_joint": sum(right["en"] + right["de"]) / 30,
    }
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert result.predictions["test_de"] == result.predictions["de"]
    assert result.metrics["test_accuracy_de"] == means["de"]


# Predictions


def test_accuracy_is_the_share_of_right_predictions(score):
    """Predictions come in another order than the examples, or of the training examples."""
    data = make_data(num_validation=700)  # more than a batch of evaluation
    result, _ = score(make_encoder(), data)
    predictions = result.predictions[""]
    assert len(predictions) == 700
    right = [p == row["label"] for p, row in zip(predictions, data.validation[""].rows)]
    assert result.metrics["accuracy"] == sum(right) / 700


def test_validation_does_not_hang_on_its_order(score):
    """Padding of a batch gets into the prediction of its shorter examples."""
    data = make_data(num_validation=70)
    one, _ = score(make_encoder(), data)
    order = random.Random(5).sample(range(70), 70)
    two, _ = score(make_encoder(), reordered(data, order))
    assert two.predictions[""] == [one.predictions[""][index] for index in order]


@pytest.mark.parametrize("kind", ["classification", "spans"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_do_not_hang_on_the_batch(architecture, kind, make_job, monkeypatch):
    """Length-grouped batches: rows given back in another order, or padding that is attended to."""
    tokenizer = make_tokenizer(architecture)
    data = data_of(kind, num_validation=40)
    job = make_job(data, task=make_task(kind))
    examples = data.validation[""]
    encoded = encode(examples, kind, False, tokenizer, job.settings, job.cache)
    config = make_encoder(architecture).config
    auto = AutoModelForQuestionAnswering if kind == "spans" else AutoModelForSequenceClassification
    torch.manual_seed(3)
    model = auto.from_config(config).train()
    together = predict(model, encoded, tokenizer, "fp32")
    assert model.training
    model.eval()
    lengths = encoded["length"][:]
    assert len(set(lengths)) > 5
    monkeypatch.setattr(finetune_module, "_EVALUATION_TOKENS", 64)
    some = predict(model, encoded, tokenizer, "fp32")
    alone = []
    for row in encoded:
        names = [name for name in ("input_ids", "token_type_ids") if name in row]
        with torch.no_grad():
            output = model(**{name: torch.tensor([row[name]]) for name in names})
        if kind == "spans":
            alone.append(torch.stack([output.start_logits[0], output.end_logits[0]], -1).numpy())
        else:
            alone.append(output.logits[0].numpy())
    if kind == "spans":
        assert [len(logits) for logits in together] == lengths
    for found in (together, some):
        for one, expected in zip(found, alone, strict=True):
            numpy.testing.assert_allclose(one, expected, atol=1e-5)


def test_batches_of_evaluation_hold_no_more_than_fits():
    """A batch of long texts that takes all memory, or one text that gets no batch at all."""
    lengths = [random.Random(7).randint(1, 500) for _ in range(300)] + [20_000]
    batches = list(finetune_module.batches_of_like_length(lengths))
    assert sorted(row for batch in batches for row in batch) == list(range(301))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert padded <= finetune_module._EVALUATION_TOKENS or len(batch) == 1
    assert list(finetune_module.batches_of_like_length([])) == []


@pytest.mark.parametrize("kind", ["classification", "spans"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kept_model_loads_with_transformers_alone(score, architecture, kind, tmp_path):
    """Weights under other names, the encoder without its head, or no tokenizer beside them."""
    data = data_of(kind)
    result, _ = score(
        make_encoder(architecture),
        data,
        architecture=architecture,
        task=make_task(kind),
        learning_rate=3e-3,
        keep_in=tmp_path / "kept",
    )
    auto = AutoModelForQuestionAnswering if kind == "spans" else AutoModelForSequenceClassification
    model, info = auto.from_pretrained(tmp_path / "kept", output_loading_info=True)
    assert not any(info.values()), info
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "kept")
    model.eval()
    for row, prediction in zip(data.validation[""].rows, result.predictions[""]):
        if kind == "spans":
            # Contexts of one window, read as the pipeline of transformers would.
            inputs = tokenizer(row["question"], row["context"], return_tensors="pt")
            if inputs["input_ids"].shape[1] > MAX_LENGTH:
                continue
            with torch.no_grad():
                output = model(**inputs)
            start, end = prediction_span(row, prediction.text, tokenizer)
            scores = output.start_logits[0][:, None] + output.end_logits[0][None]
            of_context = [i for i, s in enumerate(inputs.sequence_ids(0)) if s == 1]
            best = max(
                (float(scores[i, j]), i, j) for i in of_context for j in of_context if i <= j
            )
            assert float(scores[start, end]) == pytest.approx(best[0], abs=1e-5)
        else:
            inputs = tokenizer(row["first"], row["second"], return_tensors="pt")
            with torch.no_grad():
                output = model(**inputs)
            assert int(output.logits[0].argmax()) == prediction


def prediction_span(row, text, tokenizer):
    """First and last token of a text that occurs once in the context."""
    begin = row["context"].index(text)
    encoded = tokenizer(row["question"], row["context"])
    first = encoded.char_to_token(begin, sequence_index=1)
    last = encoded.char_to_token(begin + len(text) - 1, sequence_index=1)
    return first, last


def test_label_names_reach_the_config(score, tmp_path):
    """A kept model that answers LABEL_1 to everybody who loads it."""
    data = dataclasses.replace(make_data(), label_names=["ham", "spam"])
    score(make_encoder(), data, keep_in=tmp_path / "named")
    config = AutoConfig.from_pretrained(tmp_path / "named")
    assert config.id2label == {0: "ham", 1: "spam"}
    assert config.label2id == {"ham": 0, "spam": 1}
    score(make_encoder(), make_data(labels=(0, 1, 2)), keep_in=tmp_path / "numbered")
    config = AutoConfig.from_pretrained(tmp_path / "numbered")
    assert list(config.id2label) == [0, 1, 2]
    assert json.loads((tmp_path / "numbered" / "config.json").read_text())["problem_type"] == (
        "single_label_classification"
    )


# Precision


@pytest.mark.parametrize("kind", ["classification", "spans"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_is_computed_in_float32(score, architecture, kind, monkeypatch):
    """Scores that tie because bf16 has eight bits; or bf16 that was asked for and is not used."""
    seen = {"head": set(), "encoder": set()}

    class Recording(finetune_module._Trainer):
        def __init__(self, *, model, **arguments):
            prefix = model.base_model_prefix
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear):
                    part = "encoder" if name.startswith(f"{prefix}.") else "head"
                    module.register_forward_hook(self.record(part))
            super().__init__(model=model, **arguments)

        @staticmethod
        def record(part):
            def hook(module, inputs, output):
                seen[part].add((inputs[0].dtype, output.dtype))

            return hook

    monkeypatch.setattr(finetune_module, "_Trainer", Recording)
    job = {"architecture": architecture, "task": make_task(kind), "epochs": 1}
    data = data_of(kind, num_train=8, num_validation=8)
    score(make_encoder(architecture), data, precision="bf16", **job)
    assert seen["head"] == {(torch.float32, torch.float32)}
    assert torch.bfloat16 in {output for _, output in seen["encoder"]}
    seen["head"].clear(), seen["encoder"].clear()
    score(make_encoder(architecture), data, precision="fp32", **job)
    assert seen["head"] == seen["encoder"] == {(torch.float32, torch.float32)}


# A part of the examples


def test_share_of_the_training_examples_is_taken_at_even_distances(score, batches):
    """The first ones, which may all be of one class or one document."""
    data = make_data(num_train=50)
    score(make_encoder(), data, epochs=1, max_train_examples=20)
    seen = sorted(row for batch in batches for row in batch)
    everything = ids_of(data.train, make_tokenizer())
    assert len(set(everything)) == 50
    assert seen == sorted(everything[index] for index in [i * 50 // 20 for i in range(20)])
    batches.clear()
    score(make_encoder(), data, epochs=1, max_train_examples=51)
    assert sorted(row for batch in batches for row in batch) == sorted(everything)


def test_share_of_the_validation_examples_is_scored(score):
    """All of a large split in every epoch although a part was asked for."""
    data = make_data(num_validation=50)
    data = dataclasses.replace(data, test={"": data.validation[""]})
    whole, _ = score(make_encoder(), data)
    part, _ = score(make_encoder(), data, max_validation_examples=7)
    chosen = [index * 50 // 7 for index in range(7)]
    assert part.predictions == {
        name: [predictions[index] for index in chosen]
        for name, predictions in whole.predictions.items()
    }
    labels = [data.validation[""].rows[index]["label"] for index in chosen]
    right = [p == label for p, label in zip(part.predictions[""], labels)]
    assert part.metrics == {"accuracy": sum(right) / 7, "test_accuracy": sum(right) / 7}


# What is logged, and what is refused


def test_loss_and_metrics_are_logged_with_their_step(score):
    """Nothing is logged, or every loss under the same step, or an epoch under its number."""
    result, logged = score(make_encoder(), make_data(num_train=80), batch_size=4)
    assert [(step, set(metrics)) for step, metrics in logged] == [
        (10, {"loss"}),
        (20, {"loss"}),
        (20, {"accuracy"}),
        (30, {"loss"}),
        (40, {"loss"}),
        (40, {"accuracy"}),
    ]
    assert [metrics for _, metrics in logged if "accuracy" in metrics] == result.epochs
    assert result.metrics == result.epochs[result.best_epoch - 1]
    assert result.metrics["accuracy"] == max(epoch["accuracy"] for epoch in result.epochs)


@pytest.mark.parametrize("num_train", [24, 80])
def test_diverged_training_is_refused(score, num_train):
    """Predictions from NaN logits are class 0, half right; with and without a logged loss."""
    with pytest.raises(ExperimentError, match=r"a test.*task_training\.learning_rate"):
        score(make_encoder(), make_data(num_train=num_train), learning_rate=1e30, epochs=1)


def test_diverged_answers_are_refused(score):
    """Answers that are cut out by logits which are no numbers."""
    with pytest.raises(ExperimentError, match=r"a test.*task_training\.learning_rate"):
        score(
            make_encoder(), make_questions(), task=make_task("spans"), learning_rate=1e30, epochs=1
        )


def test_diverged_training_keeps_no_model(score, tmp_path):
    """A folder with a model of no numbers, taken for a fine-tuned one."""
    with pytest.raises(ExperimentError):
        score(make_encoder(), learning_rate=1e30, keep_in=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_texts_that_are_too_long_are_cut(score):
    """Long texts run past the last position."""
    long = " ".join(WORDS * 3)
    data = make_data()
    row = {"first": long, "second": long, "label": 1}
    train, validation = (
        make_examples([*examples.rows.to_list(), row])
        for examples in (data.train, data.validation[""])
    )
    result, _ = score(make_encoder(), TaskData(train, {"": validation}, {}, 2))
    assert len(result.predictions[""]) == 17


def test_one_text_is_enough(score, batches):
    """A task of single sentences that is encoded as pairs, or not at all."""
    data = make_data()

    def first_alone(examples):
        return make_examples(examples.rows.remove_columns("second").to_list())

    data = TaskData(first_alone(data.train), {"": first_alone(data.validation[""])}, {}, 2)
    result, _ = score(make_encoder(), data)
    assert len(result.predictions[""]) == 16
    tokenizer = make_tokenizer()
    expected = [tuple(tokenizer(text).input_ids) for text in data.train.rows["first"][:]]
    assert {row for batch in batches for row in batch} == set(expected)


def test_nothing_to_learn_from_is_refused(score):
    """A training loop over no windows, because no context holds its answer."""
    data = make_questions()
    rows = [
        row | {"answers": {"text": ["elsewhere"], "answer_start": [0]}} for row in data.train.rows
    ]
    with pytest.raises(ExperimentError, match="none of the training examples of made up"):
        score(
            make_encoder(),
            dataclasses.replace(data, train=make_examples(rows)),
            task=make_task("spans"),
        )


def test_architecture_without_the_head_is_refused(score):
    """A traceback of the library in the middle of a run."""
    config = AutoConfig.for_model(
        "eurobert",
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    encoder = AutoModel.from_config(config)
    with pytest.raises(ExperimentError, match="no spans head for eurobert"):
        score(encoder, make_questions(), task=make_task("spans"))


# Beside a teacher


SOFT = {"kind": "logits", "distance": "kl", "temperature": 2.0}
LABELS = {"kind": "labels"}
STATES = {"kind": "states", "state": "hidden", "layers": "uniform", "transforms": ["first_token"]}
RELATIONS = {"kind": "relations", "pairs": ["qk", "vv"], "num_relation_heads": 2, "layers": "last"}


@pytest.fixture
def beside(compose_config, make_job, tmp_path):
    """Fine-tunes beside a teacher; gives the score, what was logged, and the teacher."""
    settings = parse(compose_config("experiment=smoke", f"outputs_dir={tmp_path}"))

    def learnt(encoder, teacher, data, terms, *, architecture="bert", head_only=False, **job):
        job = make_job(data, **job)
        if teacher.base_model is teacher:
            teacher = with_head(teacher, job).eval().requires_grad_(False)
        objective = Objective("mine", parse_terms(terms))
        guide = Guide(teacher, dataclasses.replace(settings, objective=objective), head_only)
        logged = []
        result = finetune(
            encoder,
            make_tokenizer(architecture),
            job,
            "a test",
            lambda metrics, step: logged.append((step, dict(metrics))),
            tmp_path / "kept",
            guide,
        )
        return result, logged, teacher

    return learnt


def logged_values(logged, name):
    return [metrics[name] for _, metrics in logged if name in metrics]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_predict_alike(beside, architecture, kind):
    """A teacher that reads other tokens, another mask, or with dropout."""
    _, logged, _ = beside(
        make_encoder(architecture),
        make_encoder(architecture),
        data_of(kind),
        {"soft": SOFT, "states": STATES, "relations": RELATIONS},
        architecture=architecture,
        task=make_task(kind),
        hidden_dropout=0.0,
        learning_rate=1e-12,
        weight_decay=0.0,
        epochs=10,
    )
    names = ["loss/soft", "loss/states", "loss/relations/query-key", "loss/relations/value-value"]
    # DistilBERT's heads have a dropout of their own.
    for name in names[architecture == "distilbert" :]:
        values = logged_values(logged, name)
        assert len(values) >= 3 and max(map(abs, values)) < 1e-6


def test_teacher_is_in_evaluation_mode(beside):
    """Soft labels under dropout."""
    encoder = make_encoder()
    _, logged, teacher = beside(
        encoder, encoder, make_data(), {"soft": SOFT}, hidden_dropout=0.5, epochs=4
    )
    assert logged_values(logged, "loss/soft")[0] > 1e-4
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_labels_alone_are_fine_tuning(beside, score, kind):
    """A second way to fine-tune that gives something else."""
    data, more = data_of(kind), {"task": make_task(kind), "epochs": 5}
    plain, plainly = score(make_encoder(), data, **more)
    found, logged, _ = beside(make_encoder(), make_encoder(seed=3), data, {"a": LABELS}, **more)
    assert found.metrics == plain.metrics and found.predictions == plain.predictions
    assert logged_values(logged, "loss") == logged_values(plainly, "loss")


def test_student_learns_the_teachers_predictions(beside, score, tmp_path):
    """Labels that are read although only the teacher's predictions are asked for."""
    data = make_data(num_train=96, num_validation=32)
    job = {"epochs": 8, "learning_rate": 3e-3, "hidden_dropout": 0.0}
    score(make_encoder(), data, keep_in=tmp_path / "teacher", **job)
    teacher = load_finetuned(tmp_path / "teacher", "classification").eval().requires_grad_(False)
    wrong = [dict(row, label=1 - row["label"]) for row in data.train.rows]
    other = dataclasses.replace(data, train=make_examples(wrong))
    result, _, _ = beside(make_encoder(seed=4), teacher, other, {"soft": SOFT}, **job)
    assert result.metrics["accuracy"] > 0.9


def test_terms_and_their_weights_are_the_loss(beside):
    """A weight that is forgotten, or a logged term that is another's."""
    terms = {"soft": SOFT | {"weight": 0.25}, "labels": LABELS | {"weight": 3.0}}
    _, logged, _ = beside(make_encoder(), make_encoder(seed=3), make_data(), terms, epochs=4)
    for loss, soft, labels in zip(
        *(logged_values(logged, name) for name in ("loss", "loss/soft", "loss/labels")),
        strict=True,
    ):
        assert loss == pytest.approx(0.25 * soft + 3 * labels, rel=1e-4)


def test_micro_batches_beside_a_teacher(beside):
    """Terms of a short micro-batch that count as much as those of a whole one."""
    losses = []
    terms = {"soft": SOFT, "states": STATES}
    for microbatch in (None, 4, 6):
        _, logged, _ = beside(
            make_encoder(), make_encoder(seed=3), make_data(num_train=14), terms,
            microbatch=microbatch, epochs=5, hidden_dropout=0.0,
        )  # fmt: skip
        losses.append(
            [logged_values(logged, name) for name in ("loss", "loss/soft", "loss/states")]
        )
    for other in losses[1:]:
        for found, expected in zip(other, losses[0]):
            assert found == pytest.approx(expected, rel=1e-4)


def test_states_alone_have_no_score(beside, tmp_path):
    """The accuracy of a head that was never trained, by which an epoch is chosen."""
    result, logged, _ = beside(
        make_encoder(), make_encoder(seed=3), make_data(), {"states": STATES}, epochs=4
    )
    assert (result.metrics, result.epochs, result.predictions) == ({}, [], {})
    assert not logged_values(logged, "accuracy") and logged_values(logged, "loss/states")
    assert (tmp_path / "kept" / "model.safetensors").is_file()


def test_other_classes_of_the_teacher_are_refused(beside, make_job):
    """Soft labels of three classes for a student of two."""
    teacher = with_head(make_encoder(), make_job(make_data(labels=(0, 1, 2))))
    with pytest.raises(ExperimentError, match=r"terms\.soft.*one of 3, the student one of 2"):
        beside(make_encoder(), teacher, make_data(), {"soft": SOFT})


# Going on after an interruption


class Killed(BaseException):
    pass


@pytest.mark.parametrize("checkpoint_steps", [2, 3])
@pytest.mark.parametrize("number", [1, 3, 4])
def test_stopped_evaluation_goes_on_where_it_was(
    make_job, number, checkpoint_steps, tmp_path, monkeypatch
):
    """An epoch that is never scored because its last step was saved; the fourth is of the test."""
    data = dataclasses.replace(make_data(), test=make_data(num_validation=12).validation)
    job = dataclasses.replace(
        make_job(data, epochs=3, learning_rate=1e-3), checkpoint_steps=checkpoint_steps
    )
    evaluate, calls = finetune_module._evaluate, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return evaluate(*arguments)

    def train(folder):
        return finetune(
            make_encoder(), make_tokenizer(), job, "a test", lambda *_: None,
            tmp_path / f"{folder} kept", checkpoints=tmp_path / folder,
        )  # fmt: skip

    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "_evaluate", stopping)
        with pytest.raises(Killed):
            train("stopped")
    assert train("stopped") == whole
    weights = [
        load_file(tmp_path / f"{name} kept" / "model.safetensors") for name in ("whole", "stopped")
    ]
    assert all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_stopped_training_goes_on_where_it_was(make_job, kind, stop, tmp_path, monkeypatch):
    """Epochs in another order, dropout drawn anew, or a best epoch that is forgotten."""
    data = data_of(kind)
    # 3 or more steps an epoch, and checkpoints after every second one.
    job = dataclasses.replace(
        make_job(data, task=make_task(kind), epochs=3, hidden_dropout=0.3, learning_rate=1e-3),
        checkpoint_steps=2,
    )

    def train(checkpoints, keep_in, step_to_stop_at=None):
        steps = []
        training_step = finetune_module._Trainer.training_step

        def counted(self, *arguments, **named):
            if self.state.global_step == step_to_stop_at:
                raise Killed
            steps.append(self.state.global_step)
            return training_step(self, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(finetune_module._Trainer, "training_step", counted)
            result = finetune(
                make_encoder(), make_tokenizer(), job, "a test", lambda *_: None, keep_in,
                checkpoints=checkpoints,
            )  # fmt: skip
        return result, steps

    whole, _ = train(tmp_path / "whole checkpoints", tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "checkpoints", tmp_path / "kept", stop)
    resumed, steps = train(tmp_path / "checkpoints", tmp_path / "kept")
    assert steps[0] == {2: 2, 4: 4, 5: 4}[stop] or kind == "spans"
    assert steps[0] > 0
    assert resumed == whole
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "kept")]
    assert all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())


def test_half_written_checkpoint_is_left_out(make_job, tmp_path):
    """A checkpoint that a kill cut short, loaded as if it were whole."""
    job = dataclasses.replace(make_job(epochs=2), checkpoint_steps=1)
    folder = tmp_path / "checkpoints"
    arguments = (make_encoder(), make_tokenizer(), job, "a test", lambda *_: None)
    whole = finetune(*arguments, checkpoints=folder)
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "model.safetensors").write_bytes(b"half")
    assert finetune(*arguments, checkpoints=folder) == whole
