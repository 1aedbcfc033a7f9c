"""Fine-tuning of tiny random encoders on made-up pairs of texts."""

import copy
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from minilm_exp.errors import ExperimentError
from minilm_exp.settings import parse
from minilm_exp.tasks import finetune as finetune_module
from minilm_exp.tasks.examples import Example, TaskData
from minilm_exp.tasks.finetune import finetune

WORDS = [f"w{number}" for number in range(20)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
ARCHITECTURES = ["bert", "distilbert", "roberta"]


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


def make_data(num_train=24, num_validation=16, labels=(0, 1)):
    """The first word of the first text is the label; the rest is noise of several lengths."""
    draw = random.Random(1)

    def example(index):
        label = labels[index % len(labels)]
        noise = [" ".join(draw.choices(WORDS[5:], k=draw.randint(1, 6))) for _ in range(2)]
        return Example(first=f"{WORDS[label]} {noise[0]}", second=noise[1], label=label)

    return TaskData(
        train=[example(i) for i in range(num_train)],
        validation=[example(i) for i in range(num_validation)],
    )


@pytest.fixture(scope="module")
def base_settings(compose_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unused")
    settings = parse(compose_config("experiment=smoke", f"outputs_dir={folder}"))
    settings.task_training.max_length = 20
    settings.task_training.hidden_dropout = 0.1
    settings.task_training.batch_size = 4
    settings.task_training.epochs = 2
    return settings


@pytest.fixture
def score(base_settings):
    """Fine-tunes; gives the score and what was logged."""

    def scored(encoder, data=None, *, architecture="bert", seed=1, precision="fp32", **training):
        settings = copy.deepcopy(base_settings)
        settings.seed = seed
        for name, value in training.items():
            assert name in vars(settings.task_training)
            setattr(settings.task_training, name, value)
        logged = []
        result = finetune(
            encoder,
            make_tokenizer(architecture),
            data or make_data(),
            settings,
            precision,
            "a test",
            lambda metrics, step: logged.append((step, dict(metrics))),
        )
        return result, logged

    return scored


@pytest.fixture
def first_weights(monkeypatch):
    """Weights and dropout of each model that is handed to the training loop."""
    seen = []

    class Recording(finetune_module.Trainer):
        def __init__(self, *, model, **arguments):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            dropout = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
            seen.append((state, model.base_model_prefix, dropout))
            super().__init__(model=model, **arguments)

    monkeypatch.setattr(finetune_module, "Trainer", Recording)
    return seen


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_starts_from_the_encoder(score, first_weights, architecture):
    """Names do not fit and nothing is copied, which a lenient loader does not say."""
    encoder = make_encoder(architecture)
    score(encoder, architecture=architecture)
    [(state, prefix, _)] = first_weights
    copied = {
        name: torch.equal(tensor, state[f"{prefix}.{name}"])
        for name, tensor in encoder.state_dict().items()
        if f"{prefix}.{name}" in state
    }
    assert all(copied.values())
    assert {n for n in encoder.state_dict() if "pooler" not in n} <= set(copied)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoders_of_one_architecture_get_the_same_head(score, first_weights, architecture):
    """The head hangs on what was drawn before, so a comparison of two students is luck."""
    score(make_encoder(architecture, seed=0), architecture=architecture)
    torch.rand(17)
    score(make_encoder(architecture, seed=1), architecture=architecture)
    (one, prefix, _), (two, _, _) = first_weights
    head = [name for name in one if not name.startswith(f"{prefix}.")]
    assert head
    assert all(torch.equal(one[name], two[name]) for name in head)
    assert any(not torch.equal(one[name], two[name]) for name in one)


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
    one = score(encoder, architecture=architecture)
    torch.rand(5)
    assert score(encoder, architecture=architecture) == one
    assert score(encoder, architecture=architecture, seed=2)[1] != one[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_separable_task_is_learnt(score, architecture):
    """Labels and texts get out of step, or the head is not trained; the margin is wide."""
    result, _ = score(
        make_encoder(architecture),
        make_data(num_train=96, num_validation=32),
        architecture=architecture,
        epochs=12,
        learning_rate=3e-3,
        hidden_dropout=0.0,
    )
    assert result.accuracy >= 0.9


def test_accuracy_is_the_share_of_right_predictions(score):
    """Predictions come in another order than the examples, or of the training examples."""
    data = make_data(num_validation=70)  # more than a batch of evaluation
    result, _ = score(make_encoder(), data)
    assert len(result.predictions) == 70
    right = [p == e.label for p, e in zip(result.predictions, data.validation)]
    assert result.accuracy == sum(right) / 70


def test_three_classes(score):
    """The head has two classes whatever the labels."""
    data = make_data(num_train=96, num_validation=30, labels=(0, 1, 2))
    result, _ = score(make_encoder(), data, epochs=12, learning_rate=3e-3, hidden_dropout=0.0)
    assert set(result.predictions) == {0, 1, 2}


def test_loss_is_logged_with_its_step(score):
    """Nothing is logged, or every loss under the same step."""
    _, logged = score(make_encoder(), make_data(num_train=80))
    assert [step for step, _ in logged] == [10, 20, 30, 40]
    assert all(set(metrics) == {"loss"} for _, metrics in logged)


def test_validation_does_not_hang_on_its_order(score):
    """Padding of a batch gets into the prediction of its shorter examples."""
    data = make_data(num_validation=70)
    turned = TaskData(train=data.train, validation=data.validation[::-1])
    one, _ = score(make_encoder(), data)
    two, _ = score(make_encoder(), turned)
    assert two.predictions[::-1] == one.predictions


@pytest.mark.parametrize("num_train", [24, 80])
def test_diverged_training_is_refused(score, num_train):
    """Predictions from NaN logits are class 0, half right; with and without a logged loss."""
    with pytest.raises(ExperimentError, match=r"a test.*task_training\.learning_rate"):
        score(make_encoder(), make_data(num_train=num_train), learning_rate=1e30, epochs=1)


def test_texts_that_are_too_long_are_cut(score):
    """Long texts run past the last position."""
    long = " ".join(WORDS * 3)
    data = make_data()
    example = Example(first=long, second=long, label=1)
    result, _ = score(make_encoder(), TaskData([*data.train, example], [*data.validation, example]))
    assert len(result.predictions) == 17
