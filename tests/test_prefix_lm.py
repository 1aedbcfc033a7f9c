"""Models with the prefix mask, beside a mask that is built in loops and on tiny random weights."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from minilm_exp.errors import ExperimentError
from minilm_exp.prefix_lm import NO_LABEL, prefix_lm_class, prefix_mask, target_loss
from minilm_exp.task_settings import WRITERS

CONFIGS = {"bert": BertConfig, "roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig}
PLAIN = {"bert": BertForMaskedLM, "roberta": RobertaForMaskedLM,
         "xlm-roberta": XLMRobertaForMaskedLM}  # fmt: skip
PAD, END, VOCABULARY = 1, 3, 40
SOURCE, TARGET = [2, 10, 11, 12, 13, 3], [20, 21, 22, 23, 3]


def make_model(architecture="bert", seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "type_vocab_size": 2 if architecture == "bert" else 1,
        "pad_token_id": PAD,
        "initializer_range": 0.3,
    }
    config = CONFIGS[architecture](**{**sizes, **changes})
    return prefix_lm_class(architecture)(config).double().eval()


def inputs_of(source=SOURCE, target=TARGET, left=0, right=0):
    """Ids and masks of one sequence, with padding on either side."""
    ids = [*[PAD] * left, *source, *target, *[PAD] * right]
    real = [0] * left + [1] * (len(source) + len(target)) + [0] * right
    is_source = [0] * left + [1] * len(source) + [0] * (len(target) + right)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.tensor([real]),
        "source_mask": torch.tensor([is_source]),
    }


def logits_of(model, *given, **named):
    """Logits of the places that predict the target, (tokens of the target, vocabulary)."""
    inputs = inputs_of(*given, **named)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    first = inputs["source_mask"][0].nonzero().max()
    num_target = int((inputs["attention_mask"] - inputs["source_mask"]).sum())
    return logits[first : first + num_target]


def loops(real, source):
    """Row by row and token by token, from UniLM's rule in words."""
    size = len(real)
    seen = [[False] * size for _ in range(size)]
    for row in range(size):
        for column in range(size):
            by_target = not source[row] and column <= row  # what came before, and itself
            seen[row][column] = bool(real[column] and (source[column] or by_target))
    return seen


@pytest.mark.parametrize("left, right", [(0, 0), (2, 0), (0, 3), (1, 2)])
def test_mask_is_that_of_the_rule_in_words(left, right):
    """A target that sees its future, or a source that sees the target."""
    inputs = inputs_of(left=left, right=right)
    real, source = inputs["attention_mask"], inputs["source_mask"]
    expected = torch.tensor(loops(real[0].tolist(), source[0].tolist()))
    found = prefix_mask(real, source, real.shape[1])[0]
    rows = real[0].bool()  # of padding nobody reads the row
    assert torch.equal(found[rows], expected[rows])
    assert found.any(dim=1).all()
    for number in (1, 4):
        assert torch.equal(prefix_mask(real, source, number)[0], found[-number:])


@pytest.mark.parametrize("architecture", WRITERS)
def test_logits_are_those_of_the_library_under_that_mask(architecture):
    """Positions, segments or a head that are not those of the plain model."""
    model = make_model(architecture)
    inputs = inputs_of()
    plain = PLAIN[architecture](CONFIGS[architecture].from_dict(model.config.to_dict()))
    plain.config.is_decoder = False
    plain.double().eval().load_state_dict(model.state_dict(), strict=False)
    seen = loops([1] * 11, [1] * 6 + [0] * 5)
    first = PAD + 1 if architecture != "bert" else 0
    segments = [0] * 6 + [1 if architecture == "bert" else 0] * 5
    with torch.no_grad():
        expected = plain(
            inputs["input_ids"],
            attention_mask=torch.tensor(seen)[None, None],
            position_ids=torch.arange(first, first + 11)[None],
            token_type_ids=torch.tensor([segments]),
        ).logits
        found = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", WRITERS)
def test_later_targets_do_not_change_earlier_predictions(architecture):
    """A model that learns to copy what it should predict."""
    model = make_model(architecture)
    before = logits_of(model)
    for place in range(len(TARGET)):
        changed = [*TARGET[:place], 30, *TARGET[place + 1 :]]
        after = logits_of(model, target=changed)
        # The token in this place is read by the predictions after it.
        assert torch.equal(after[: place + 1], before[: place + 1])
        assert not torch.isclose(after[place + 1 :], before[place + 1 :]).all(dim=1).any()


@pytest.mark.parametrize("architecture", WRITERS)
def test_every_source_token_changes_every_prediction(architecture):
    """A source that is read from left to right, or only in part."""
    model = make_model(architecture)
    before = logits_of(model)
    for place in range(len(SOURCE)):
        after = logits_of(model, source=[*SOURCE[:place], 31, *SOURCE[place + 1 :]])
        assert not torch.isclose(after, before).all(dim=1).any()


@pytest.mark.parametrize("architecture", WRITERS)
def test_the_source_does_not_read_the_target(architecture):
    """A cache of the source that would be another one after the first token."""
    model = make_model(architecture)

    def states(target):
        inputs = inputs_of(target=target)
        with torch.no_grad():
            return model(**inputs).logits[0, : len(SOURCE)]

    assert torch.equal(states(TARGET), states([33, 34, 35, 36, 37]))


@pytest.mark.parametrize("architecture", WRITERS)
@pytest.mark.parametrize("left, right", [(3, 0), (0, 4), (2, 1)])
def test_padding_never_matters(architecture, left, right):
    """Positions that count padding, or a batch that is not what its sequences are alone."""
    model = make_model(architecture)
    torch.testing.assert_close(
        logits_of(model, left=left, right=right), logits_of(model), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("architecture", WRITERS)
@pytest.mark.parametrize("left", [0, 3])
def test_source_and_then_token_by_token_is_the_whole(architecture, left):
    """A cached step with a mask, position or segment of its own."""
    model = make_model(architecture)
    inputs = inputs_of(left=left)
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    num_source = left + len(SOURCE)
    source = real[:, :num_source]
    with torch.no_grad():
        whole = model(**inputs).logits
        output = model(ids[:, :num_source], source, source, use_cache=True)
        steps = [output.logits[:, -1]]
        for place in range(num_source, ids.shape[1]):
            output = model(
                ids[:, place : place + 1],
                source,
                real[:, : place + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            steps.append(output.logits[:, -1])
    torch.testing.assert_close(
        torch.stack(steps, 1), whole[:, num_source - 1 :], rtol=0, atol=1e-12
    )


def test_attention_that_adds_its_mask_gives_the_same():
    """Truth values that are added to the scores, so that nothing is masked."""
    model = make_model()
    before = logits_of(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", WRITERS)
def test_labels_choose_the_logits_of_the_targets(architecture):
    """A loss on tokens of the source, or a target that is shifted by one."""
    model = make_model(architecture)
    inputs = inputs_of(right=2)
    labels = torch.full_like(inputs["input_ids"], NO_LABEL)
    for place, token in enumerate(TARGET):
        labels[0, len(SOURCE) - 1 + place] = token
    with torch.no_grad():
        found = model(**inputs, labels=labels).logits
    torch.testing.assert_close(found, logits_of(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_loops(smoothing):
    """Smoothing that leaves out a token, or a mean over sequences instead of tokens."""
    torch.manual_seed(1)
    labels = torch.tensor([[NO_LABEL, 4, 7, NO_LABEL], [2, NO_LABEL, NO_LABEL, NO_LABEL]])
    logits = torch.randn(3, 9)
    losses = []
    for row, right in zip(logits.double(), (4, 7, 2)):
        total = 0.0
        normaliser = torch.logsumexp(row, 0)
        for token, value in enumerate(row):
            share = smoothing / 9 + (1 - smoothing) * (token == right)
            total -= share * float(value - normaliser)
        losses.append(total)
    expected = sum(losses) / 3
    assert float(target_loss(logits, labels, smoothing)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("architecture", WRITERS)
def test_output_embeddings_are_the_input_embeddings(architecture):
    """Embeddings that are learnt twice."""
    model = make_model(architecture)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_saved_model_is_an_encoder_in_both_directions(tmp_path):
    """A generator in student.path whose encoder would read from left to right only."""
    model = make_model()
    model.save_pretrained(tmp_path)
    assert model.config.is_decoder
    encoder = AutoModel.from_pretrained(tmp_path).double().eval()
    assert encoder.config.is_decoder is False
    ids = torch.tensor([SOURCE])
    with torch.no_grad():
        states = encoder(ids).last_hidden_state
        changed = encoder(torch.tensor([[*SOURCE[:-1], 30]])).last_hidden_state
        logits = getattr(model, model.head_name)(states)
        found = model(ids, torch.ones_like(ids)).logits
    assert not torch.isclose(states[0, 0], changed[0, 0]).all()
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-12)


def test_gradients_reach_every_parameter():
    """A part of the model that never learns."""
    model = make_model()
    inputs = inputs_of()
    labels = inputs["input_ids"].masked_fill(inputs["source_mask"].bool(), NO_LABEL)
    target_loss(model(**inputs, labels=labels).logits, labels, 0.1).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert not silent


def test_other_architectures_are_refused():
    """An architecture without this class, told as an error of the library."""
    with pytest.raises(ExperimentError, match="distilbert cannot write"):
        prefix_lm_class("distilbert")
