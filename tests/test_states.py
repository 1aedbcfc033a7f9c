"""The states that a tap returns, against the untouched model, for every kind of architecture.

All models are tiny and random. Weights are drawn wide, and biases and norms are shifted away from
their neutral start, because a bias that is forgotten would otherwise change nothing.
"""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModel

from minilm_exp.errors import ExperimentError
from minilm_exp.states import StateTap, qkv_states

NUM_LAYERS, NUM_HEADS, HIDDEN_SIZE = 3, 4, 32
STATES = ("query", "key", "value")
PAD = 1


class QKVTap(StateTap):
    """The query, key and value states of one layer, by their names."""

    def __init__(self, encoder, layer):
        super().__init__(encoder, qkv_states(layer))

    def forward(self, **inputs):
        return {state.name: tensor for state, tensor in super().forward(**inputs).items()}


COMMON = {
    "vocab_size": 40,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
EXTRA = {
    "albert": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "electra": {"embedding_size": 16},
    "eurobert": {"num_key_value_heads": 2},
    "modernbert": {"global_attn_every_n_layers": 2},
    "rembert": {"input_embedding_size": 16},
    "roformer": {"embedding_size": 16},
}

# What makes the states of a layer, by the end of its path: the projections, and the norm before
# them where the layer has one there.
BERT_PROJECTIONS = ("query", "key", "value")
PROJECTIONS = {
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "eurobert": ("q_proj", "k_proj", "v_proj"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "k", "v"),
}
NORM_BEFORE = {
    "eurobert": ("input_layernorm",),
    "megatron-bert": ("attention.ln",),
    "modernbert": ("attn_norm",),
}
BIASES = {"deberta": ("q_bias", "v_bias")}

BERT_LIKE = ["bert", "camembert", "data2vec-text", "electra", "ernie", "roberta", "xlm-roberta"]
THROUGH_INTERFACE = [*BERT_LIKE, "albert", "distilbert", "eurobert", "modernbert"]
OWN_ATTENTION = ["deberta", "deberta-v2", "megatron-bert", "mpnet", "rembert", "roformer"]
SUPPORTED = THROUGH_INTERFACE + OWN_ATTENTION
ROTARY = ["eurobert", "modernbert", "roformer"]
BIASED_ATTENTION = ["deberta", "deberta-v2", "mpnet"]  # scores are more than the dot product

ALL_LAYERS = range(1, NUM_LAYERS + 1)

IDS = torch.tensor(
    [
        [5, 17, 9, 33, 12, 28, 7],
        [21, 8, 38, 3, 11, PAD, PAD],
        [PAD, PAD, PAD, 30, 6, 25, 14],
    ]
)
MASK = (IDS != PAD).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
OTHER_INPUTS = {"input_ids": IDS.flip(0, 1), "attention_mask": MASK.flip(0, 1)}


def make_encoder(model_type, implementation=None, seed=0, **more):
    settings = {**COMMON, **EXTRA.get(model_type, {}), **more}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    encoder = AutoModel.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return encoder


def projection_names(encoder):
    return PROJECTIONS.get(encoder.config.model_type, BERT_PROJECTIONS)


def record_projections(encoder, layer):
    """Output of each projection of one layer, from hooks in a full forward pass.

    Counted in calls, not in modules: ALBERT calls the same modules once for every layer.
    """
    names = projection_names(encoder)
    outputs = {name: [] for name in names}
    handles = []
    for path, module in encoder.named_modules():
        name = path.split(".")[-1]
        if name in names:
            handles.append(
                module.register_forward_hook(
                    lambda _module, _args, output, name=name: outputs[name].append(output)
                )
            )
    encoder(**INPUTS)
    for handle in handles:
        handle.remove()
    assert {len(calls) for calls in outputs.values()} == {NUM_LAYERS}
    return [outputs[name][layer - 1] for name in names]


def layers_of(encoder):
    return next(
        (path, module)
        for path, module in encoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == NUM_LAYERS
    )


def split_heads(state):
    return state.unflatten(-1, (NUM_HEADS, HIDDEN_SIZE // NUM_HEADS)).transpose(1, 2)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, state in actual.items():
        assert torch.equal(state, expected[name]), name


def output_of(encoder):
    with torch.no_grad():
        return encoder(**INPUTS).last_hidden_state


def tap_once(encoder, layer, inputs):
    tap = QKVTap(encoder, layer)
    states = tap(**inputs)
    tap.close()
    return states


@pytest.mark.parametrize("layer", ALL_LAYERS)
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_shapes(model_type, layer):
    """An architecture that stops working with a new version of transformers."""
    states = QKVTap(make_encoder(model_type), layer)(**INPUTS)
    assert tuple(states) == STATES
    assert all(state.shape == (*IDS.shape, HIDDEN_SIZE) for state in states.values())
    assert all(torch.isfinite(state).all() for state in states.values())


@pytest.mark.parametrize("layer", ALL_LAYERS)
@pytest.mark.parametrize("model_type", [m for m in SUPPORTED if m not in BIASED_ATTENTION])
def test_query_key_relation_is_the_models_attention(model_type, layer):
    """Heads interleaved, another layer's states, rotation left out, keys grouped wrongly."""
    with torch.no_grad():
        eager = make_encoder(model_type, "eager").double()
        expected = eager(**INPUTS, output_attentions=True).attentions[layer - 1]
        states = QKVTap(make_encoder(model_type).double(), layer)(**INPUTS)
    query, key = split_heads(states["query"]), split_heads(states["key"])
    scores = query @ key.mT / (HIDDEN_SIZE // NUM_HEADS) ** 0.5
    actual = scores.masked_fill(MASK[:, None, None, :] == 0, -torch.inf).softmax(dim=-1)
    for sequence, is_token in enumerate(MASK.bool()):
        rows = expected[sequence][:, is_token]
        assert rows.std() > 0.03  # far from uniform, or the comparison shows little
        assert (actual[sequence][:, is_token] - rows).abs().max() < 1e-6


@pytest.mark.parametrize("layer", ALL_LAYERS)
@pytest.mark.parametrize("model_type", [m for m in SUPPORTED if m not in (*ROTARY, "deberta")])
def test_states_are_the_projections_outputs(model_type, layer):
    """Query, key and value swapped, a bias lost, or lower layers run without their mask."""
    encoder = make_encoder(model_type)
    expected = dict(zip(STATES, record_projections(encoder, layer)))
    assert_same(QKVTap(encoder, layer)(**INPUTS), expected)


@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_deberta_states_from_its_fused_projection(layer):
    """The projection read as all queries, all keys, all values; it is so only inside a head."""
    encoder = make_encoder("deberta")
    (fused,) = record_projections(encoder, layer)
    attention = encoder.encoder.layer[layer - 1].attention.self
    head_size = HIDDEN_SIZE // NUM_HEADS
    parts = [
        torch.cat(
            [
                fused[..., (3 * head + part) * head_size : (3 * head + part + 1) * head_size]
                for head in range(NUM_HEADS)
            ],
            dim=-1,
        )
        for part in range(3)
    ]
    assert attention.q_bias.abs().min() > 0 and attention.v_bias.abs().min() > 0
    expected = (parts[0] + attention.q_bias, parts[1], parts[2] + attention.v_bias)
    states = QKVTap(encoder, layer)(**INPUTS)
    for name, state in zip(STATES, expected):
        assert_near(states[name], state)


@pytest.mark.parametrize("layer", ALL_LAYERS)
@pytest.mark.parametrize("rotary_value", [False, True])
def test_roformer_states_are_rotated(rotary_value, layer):
    """Rotation left out, by head in place of by position, or put on the values uninvited.

    A pair of neighbouring numbers is a complex number, turned by position x frequency.
    """
    encoder = make_encoder("roformer", rotary_value=rotary_value)
    head_size = HIDDEN_SIZE // NUM_HEADS
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle = torch.arange(IDS.shape[1])[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)
    states = QKVTap(encoder, layer)(**INPUTS)
    for name, projected in zip(STATES, record_projections(encoder, layer)):
        expected = projected
        if name != "value" or rotary_value:
            pairs = split_heads(projected).double().unflatten(-1, (-1, 2)).contiguous()
            turned = torch.view_as_real(torch.view_as_complex(pairs) * turn)
            expected = turned.flatten(-2).transpose(1, 2).flatten(2).float()
            assert not torch.allclose(expected, projected, atol=1e-2)
        assert_near(states[name], expected)


@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_grouped_query_attention_repeats_its_heads(layer):
    """Key and value heads tiled (0 1 0 1) where the queries share them in order (0 0 1 1)."""
    encoder = make_encoder("eurobert")
    *_, values = record_projections(encoder, layer)
    first, second = values.chunk(2, dim=-1)
    states = QKVTap(encoder, layer)(**INPUTS)
    assert torch.equal(states["value"], torch.cat([first, first, second, second], dim=-1))
    heads = split_heads(states["key"])
    assert torch.equal(heads[:, 0], heads[:, 1]) and torch.equal(heads[:, 2], heads[:, 3])
    assert not torch.allclose(heads[:, 1], heads[:, 2], atol=1e-2)


@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_modernbert_values_from_its_fused_projection(layer):
    """Queries or keys returned as values, which the attention cannot show."""
    encoder = make_encoder("modernbert")
    (fused,) = record_projections(encoder, layer)
    states = QKVTap(encoder, layer)(**INPUTS)
    assert torch.equal(states["value"], fused[..., 2 * HIDDEN_SIZE :])


@pytest.mark.parametrize("layer", ALL_LAYERS)
@pytest.mark.parametrize("model_type", [m for m in SUPPORTED if m != "albert"])
def test_nothing_above_the_states_is_computed_or_trained(model_type, layer):
    """Time spent, and gradients or weight decay given, above the layer that is distilled.

    Also a gradient that is lost on the way to the embeddings.
    """
    encoder = make_encoder(model_type)
    layers_path, _ = layers_of(encoder)
    tapped = f"{layers_path}.{layer - 1}."
    makers = (*projection_names(encoder), *NORM_BEFORE.get(model_type, ()))
    makers = tuple(f".{name}" for name in (*makers, *BIASES.get(model_type, ())))
    lower = tuple(f"{layers_path}.{index}." for index in range(layer - 1))
    not_lower = tuple(f"{layers_path}.{index}." for index in range(layer - 1, NUM_LAYERS))

    tap = QKVTap(encoder, layer)
    called = set()
    for path, module in encoder.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda _module, _args, path=path: called.add(path))
    states = tap(**INPUTS)
    generator = torch.Generator().manual_seed(1)
    sum(
        (torch.randn(state.shape, generator=generator) * state).sum() for state in states.values()
    ).backward()

    leaves = {path for path, module in encoder.named_modules() if not list(module.children())}
    made_here = {path for path in leaves if path.startswith(tapped) and path.endswith(makers)}
    assert {path for path in called if path.startswith(not_lower)} == made_here
    assert all(any(path.startswith(prefix) for path in called) for prefix in lower)
    assert not any("pooler" in path or path == "final_norm" for path in called)

    trained, weights = set(), dict(encoder.named_parameters())
    for path, weight in weights.items():
        if weight.grad is not None:
            trained.add(path)
            if weight.dim() > 1:
                assert weight.grad.abs().max() > 0, path
    expected_here = {
        path
        for path in weights
        if path.startswith(tapped)
        and path.removesuffix(".weight").removesuffix(".bias").endswith(makers)
    }
    assert {path for path in trained if path.startswith(not_lower)} == expected_here
    assert trained >= {path for path in weights if path.startswith(lower)}
    (table,) = [
        path for path, weight in weights.items() if weight is encoder.get_input_embeddings().weight
    ]
    assert table in trained


@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_albert_layers_are_counted_in_calls(layer):
    """The one shared layer taken for layer 1 whatever is asked."""
    encoder = make_encoder("albert")
    tap = QKVTap(encoder, layer)
    calls = []
    feed_forward = encoder.encoder.albert_layer_groups[0].albert_layers[0].ffn
    feed_forward.register_forward_hook(lambda *_: calls.append(1))
    tap(**INPUTS)
    assert len(calls) == layer - 1


@pytest.mark.parametrize(
    "model_type, implementation",
    [
        *((model_type, "eager") for model_type in SUPPORTED),
        *((model_type, "sdpa") for model_type in THROUGH_INTERFACE),
    ],
)
def test_encoder_is_itself_beside_and_after_the_tap(model_type, implementation):
    """An encoder that is saved or evaluated cut short, or with another attention than it had."""
    encoder = make_encoder(model_type, implementation)
    weights = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    before = output_of(encoder)
    tap = QKVTap(encoder, 2)
    tap(**INPUTS)
    torch.testing.assert_close(output_of(encoder)[MASK == 1], before[MASK == 1])
    tap.close()
    assert encoder.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in encoder.modules())
    assert torch.equal(output_of(encoder), before)
    assert_same(encoder.state_dict(), weights)


@pytest.mark.parametrize("first_type", ["bert", "modernbert", "mpnet"])
@pytest.mark.parametrize("second_type", ["distilbert", "deberta"])
def test_two_taps_taking_turns(first_type, second_type):
    """One tap's count or hook acting on the other's model, as teacher and student would."""
    first, second = make_encoder(first_type, seed=1), make_encoder(second_type, seed=2)
    expected_first = tap_once(first, 3, INPUTS)
    expected_second = tap_once(second, 2, OTHER_INPUTS)
    first_tap, second_tap = QKVTap(first, 3), QKVTap(second, 2)
    for _ in range(2):
        assert_same(first_tap(**INPUTS), expected_first)
        assert_same(second_tap(**OTHER_INPUTS), expected_second)
    second_tap.close()
    assert_same(first_tap(**INPUTS), expected_first)


@pytest.mark.parametrize("outer_type", ["bert", "mpnet"])
@pytest.mark.parametrize("inner_type", ["roberta", "deberta"])
def test_tap_inside_a_tap(inner_type, outer_type):
    """An inner tap that leaves the outer one's count off, or switched off."""
    outer, inner = make_encoder(outer_type, seed=1), make_encoder(inner_type, seed=2)
    expected_outer = tap_once(outer, 3, INPUTS)
    expected_inner = tap_once(inner, 1, OTHER_INPUTS)
    outer_tap, inner_tap = QKVTap(outer, 3), QKVTap(inner, 1)
    seen = []
    _, layers = layers_of(outer)
    layers[1].register_forward_pre_hook(lambda *_: seen.append(inner_tap(**OTHER_INPUTS)))
    assert_same(outer_tap(**INPUTS), expected_outer)
    assert len(seen) == 1
    assert_same(seen[0], expected_inner)


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_two_taps_on_one_encoder(model_type):
    """The hook of another tap's layer firing first."""
    encoder = make_encoder(model_type)
    expected = {layer: tap_once(encoder, layer, INPUTS) for layer in (1, 3)}
    taps = {layer: QKVTap(encoder, layer) for layer in (1, 3)}
    for layer in (3, 1, 3):
        assert_same(taps[layer](**INPUTS), expected[layer])


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_tap_survives_an_error_in_the_encoder(model_type):
    """A tap left switched on, which then cuts an ordinary forward pass short."""
    encoder = make_encoder(model_type)
    expected, before = tap_once(encoder, 2, INPUTS), output_of(encoder)
    tap = QKVTap(encoder, 2)
    with pytest.raises(IndexError):
        tap(input_ids=torch.full_like(IDS, 10_000))
    torch.testing.assert_close(output_of(encoder)[MASK == 1], before[MASK == 1])
    assert_same(tap(**INPUTS), expected)


@pytest.mark.parametrize("layer", [-1, 0, NUM_LAYERS + 1])
@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_layer_out_of_range_is_refused(model_type, layer):
    """Layer 0 or -1 read from the end of a list."""
    encoder = make_encoder(model_type)
    message = f"layer {layer} is outside 1..{NUM_LAYERS} of this {model_type} encoder"
    with pytest.raises(ExperimentError, match=re.escape(message)):
        QKVTap(encoder, layer)


@pytest.mark.parametrize("model_type", ["bart", "fnet", "t5", "xlm"])
def test_unsupported_architecture_is_refused(model_type):
    """No attention, another attention, or cross-attention counted as a layer's own."""
    settings = {"t5": {"d_kv": 8, "d_ff": 48}, "bart": {"decoder_start_token_id": 2}}
    encoder = make_encoder(model_type, **settings.get(model_type, {}))
    with pytest.raises(ExperimentError, match=f"architecture '{model_type}' cannot be taken"):
        QKVTap(encoder, 1)
