"""The student's shape and first weights, for architectures that name their sizes differently."""

import copy
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from minilm_exp.errors import ExperimentError
from minilm_exp.settings import Student
from minilm_exp.states import State, StateTap, layers_of, qkv_states
from minilm_exp.student import (
    build_student,
    count_parameters,
    load_checkpoint,
    set_dropout,
    untrained_parameters,
)

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def make_student(**changes):
    values = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": None,
        "embedding_size": None,
        "init": "random",
        "init_layers": "evenly",
        "vocabulary": "full",
        "min_token_count": 1,
        "path": None,
        "config": None,
    }
    return Student(**{**values, **changes})


@pytest.fixture
def make_teacher(tiny_tokenizer):
    def made(model_type, **changes):
        settings = {**COMMON, "vocab_size": len(tiny_tokenizer), **changes}
        torch.manual_seed(3)
        return AutoModel.from_config(AutoConfig.for_model(model_type, **settings)).eval()

    return made


@pytest.fixture
def build(tiny_tokenizer):
    def built(teacher, teacher_layer=4, dropout=(0.0, 0.0), seed=1, **changes):
        student = make_student(**changes)
        return build_student(student, teacher, tiny_tokenizer, teacher_layer, dropout, seed)

    return built


def runs(encoder):
    """Whether the encoder computes states of its hidden size."""
    with torch.no_grad():
        states = encoder.eval()(input_ids=torch.tensor([[2, 9, 8, 3]])).last_hidden_state
    return states.shape == (1, 4, encoder.config.hidden_size) and bool(states.isfinite().all())


# Shapes


@pytest.mark.parametrize("teacher_width", [48, 128, 160])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "albert", "mpnet"])
def test_feed_forward_is_four_times_as_wide(model_type, teacher_width, make_teacher, build):
    """The teacher's width or ratio kept, as another implementation does."""
    teacher = make_teacher(model_type, intermediate_size=teacher_width)
    config = build(teacher).config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 16)
    assert (config.num_attention_heads, config.intermediate_size) == (2, 64)
    assert type(build(teacher)) is type(teacher)
    assert build(teacher, intermediate_size=40).config.intermediate_size == 40
    assert teacher.config.hidden_size == 32
    if model_type != "mpnet":  # its layers read a relative position for each pair
        assert runs(build(teacher))


def test_distilbert(make_teacher, build):
    """Sizes set under names that DistilBERT does not read."""
    teacher = make_teacher("distilbert", dim=32, n_layers=4, n_heads=4, hidden_dim=48)
    encoder = build(teacher)
    assert (encoder.config.dim, encoder.config.n_layers, encoder.config.n_heads) == (16, 2, 2)
    assert len(layers_of(encoder)) == 2
    assert encoder.transformer.layer[0].ffn.lin1.weight.shape == (64, 16)
    assert runs(encoder)


@pytest.mark.parametrize(
    "teacher_size, asked, expected",
    [(8, None, 8), (32, None, 16), (8, 4, 4), (32, 8, 8), (8, 16, 16)],
)
def test_embedding_size_of_electra(teacher_size, asked, expected, make_teacher, build):
    """Embeddings of the teacher's width below a narrow student, or the asked one ignored."""
    encoder = build(make_teacher("electra", embedding_size=teacher_size), embedding_size=asked)
    assert encoder.get_input_embeddings().weight.shape[1] == expected
    assert runs(encoder)


def test_embedding_size_where_there_is_none(make_teacher, build):
    """A setting without effect."""
    teacher = make_teacher("bert")
    with pytest.raises(ExperimentError, match=r"student\.embedding_size=8: bert has no"):
        build(teacher, embedding_size=8)
    assert runs(build(teacher, embedding_size=16))


def test_gated_feed_forward_keeps_the_ratio(make_teacher, build):
    """A gate counted as if it were not there: half as many parameters again."""
    teacher = make_teacher("modernbert")
    encoder = build(teacher)
    assert encoder.config.intermediate_size == 24
    assert encoder.layers[0].mlp.Wi.weight.shape == (48, 16)
    assert build(teacher, intermediate_size=40).config.intermediate_size == 40
    assert runs(encoder)


@pytest.mark.parametrize("teacher_layer", [3, 4, 5, 6])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
def test_attention_types_end_like_the_teacher_layer(teacher_layer, num_layers, make_teacher, build):
    """A student whose last layer sees a window while the teacher layer sees everything."""
    teacher = make_teacher("modernbert", num_hidden_layers=6, global_attn_every_n_layers=3)
    types = teacher.config.layer_types
    assert len(set(types)) == 2
    encoder = build(teacher, teacher_layer=teacher_layer, num_layers=num_layers)
    found = encoder.config.layer_types
    assert len(found) == num_layers
    assert found[-1] == types[teacher_layer - 1]
    shared = min(num_layers, teacher_layer)
    assert found[-shared:] == types[teacher_layer - shared : teacher_layer]
    assert runs(encoder)


def test_grouped_heads_keep_their_group(make_teacher, build):
    """More key heads than query heads, or a head size of the teacher's."""
    teacher = make_teacher("eurobert", num_key_value_heads=2, head_dim=8)
    encoder = build(teacher, hidden_size=24, num_attention_heads=6)
    assert encoder.config.num_key_value_heads == 3
    assert encoder.config.head_dim == 4
    assert runs(encoder)


def test_shape_that_cannot_be_built_is_refused(make_teacher, build):
    """A constructor's traceback for sizes that do not fit together."""
    with pytest.raises(ExperimentError, match="student: bert cannot be built in this shape"):
        build(make_teacher("bert"), num_attention_heads=5)


def test_student_config_file_gives_the_shape(make_teacher, build, tmp_path, tiny_tokenizer):
    """The numbers of the option used although a config was given."""
    config = BertConfig(
        **{**COMMON, "hidden_size": 24, "intermediate_size": 30},
        vocab_size=len(tiny_tokenizer),
        hidden_act="relu",
    )
    config.save_pretrained(tmp_path)
    encoder = build(make_teacher("bert"), config=str(tmp_path / "config.json"))
    assert encoder.config.hidden_act == "relu"
    assert encoder.encoder.layer[0].intermediate.dense.weight.shape == (30, 24)


def test_config_file_in_the_home_folder(make_teacher, build, tmp_path, monkeypatch):
    """A path with ~ that the settings accept and the builder looks for on the hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    make_teacher("bert").config.save_pretrained(tmp_path)
    assert build(make_teacher("bert"), config="~/config.json").config.hidden_size == 32


@pytest.mark.parametrize(
    "model_type, hidden, attention",
    [
        ("bert", ["hidden_dropout_prob"], ["attention_probs_dropout_prob"]),
        ("distilbert", ["dropout"], ["attention_dropout"]),
        ("modernbert", ["embedding_dropout", "mlp_dropout"], ["attention_dropout"]),
    ],
)
def test_dropout_is_set_under_every_name(model_type, hidden, attention, make_teacher, build):
    """Dropout that stays at the teacher's value, in the config or in the modules."""
    encoder = build(make_teacher(model_type), dropout=(0.3, 0.2))
    assert [getattr(encoder.config, name) for name in hidden] == [0.3] * len(hidden)
    assert [getattr(encoder.config, name) for name in attention] == [0.2] * len(attention)
    used = {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)}
    assert 0.3 in used
    assert used <= {0.3, 0.2}
    set_dropout(encoder.config, 0.0, 0.1)
    assert [getattr(encoder.config, name) for name in hidden] == [0.0] * len(hidden)


# First weights


def test_random_weights_follow_the_seed(tiny_bert, build):
    """Three seeds that are one run, or a seed that does not bring a run back."""
    first, same, other = (build(tiny_bert, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(first[name], other[name])


def test_random_student_has_none_of_the_teachers_weights(tiny_bert, build):
    """Embeddings shared with the teacher in a student that is said to start at random."""
    encoder = build(tiny_bert, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    teacher = tiny_bert.state_dict()
    for name, tensor in encoder.state_dict().items():
        if name.endswith("weight") and "LayerNorm" not in name:
            assert not torch.equal(tensor, teacher[name])


@pytest.mark.parametrize(
    "num_layers, teacher_layer, sources",
    [(2, 4, [2, 4]), (2, 3, [2, 3]), (3, 4, [1, 3, 4]), (1, 4, [4]), (4, 4, [1, 2, 3, 4])],
)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_teacher_layers_are_copied(
    model_type, num_layers, teacher_layer, sources, make_teacher, build
):
    """Layers counted from 0, the first ones taken, or the embeddings left at random."""
    names = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48}
    teacher = make_teacher(model_type, **(names if model_type == "distilbert" else {}))
    encoder = build(
        teacher,
        teacher_layer=teacher_layer,
        init="teacher_layers",
        num_layers=num_layers,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
    )
    for layer, source in zip(layers_of(encoder), sources):
        expected = layers_of(teacher)[source - 1].state_dict()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, expected[name])
    expected = teacher.embeddings.state_dict()
    for name, tensor in encoder.embeddings.state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("chosen", "sources"),
    [
        ("whole", [2, 4]),
        ("every_second", [2, 4]),
        ("first", [1, 2]),
        ("last", [2, 3]),
        ([4, 1], [4, 1]),
    ],
    ids=str,
)
def test_chosen_teacher_layers_are_copied(chosen, sources, tiny_bert, build):
    """A strategy that counts from 0, or takes layers above the one that is distilled."""
    encoder = build(
        tiny_bert,
        teacher_layer=3,
        init="teacher_layers",
        init_layers=chosen,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
    )
    for layer, source in zip(layers_of(encoder), sources, strict=True):
        expected = layers_of(tiny_bert)[source - 1].state_dict()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, expected[name])


def test_all_layers_copied_give_the_teachers_states(tiny_bert, build):
    """A weight that the copy forgets, such as a norm or a position."""
    encoder = build(
        tiny_bert,
        init="teacher_layers",
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
    ).eval()
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    with torch.no_grad():
        states = [model(input_ids=ids).last_hidden_state for model in (tiny_bert, encoder)]
    torch.testing.assert_close(*states)


def test_copies_are_not_shared_with_the_teacher(tiny_bert, build):
    """Training the student trains the teacher."""
    before = {name: tensor.clone() for name, tensor in tiny_bert.state_dict().items()}
    encoder = build(
        tiny_bert,
        init="teacher_layers",
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], t) for name, t in tiny_bert.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_layers_of_other_sizes_are_not_copied(tiny_bert, build):
    """Half a copy: embeddings from the teacher, layers at random."""
    with pytest.raises(ExperimentError, match=r"student\.intermediate_size=48"):
        build(tiny_bert, init="teacher_layers", hidden_size=32, num_attention_heads=4)


def test_layers_that_share_weights_are_not_copied(make_teacher, build):
    """ALBERT, which has one layer, met with an index error."""
    with pytest.raises(ExperimentError, match=r"no list of \d layers"):
        build(
            make_teacher("albert"),
            init="teacher_layers",
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=48,
        )


# A checkpoint to go on from


@pytest.fixture
def checkpoint(tmp_path, tiny_bert, tiny_tokenizer, build):
    folder = tmp_path / "student"
    build(tiny_bert, seed=5).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_student_path_is_loaded(checkpoint, tiny_bert, build):
    """A checkpoint that is ignored, or loaded with its old dropout."""
    encoder = build(tiny_bert, path=str(checkpoint), seed=9, dropout=(0.3, 0.2), num_layers=1)
    expected = build(tiny_bert, seed=5).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in encoder.state_dict().items())
    assert encoder.embeddings.dropout.p == 0.3


def test_student_path_with_another_vocabulary_is_refused(
    checkpoint, tiny_bert, tiny_tokenizer, build
):
    """As many tokens, but others: relations between different words."""
    path = checkpoint / "tokenizer.json"
    text = path.read_text()
    assert '"student"' in text
    path.write_text(text.replace('"student"', '"scholar"'))
    with pytest.raises(ExperimentError, match=r"student\.path.*another vocabulary"):
        build(tiny_bert, path=str(checkpoint))


def test_student_path_with_another_architecture_is_refused(
    make_teacher, tmp_path, tiny_bert, tiny_tokenizer, build
):
    """Two architectures whose states are compared as if they were alike."""
    make_teacher("electra").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ExperimentError, match="is a ElectraModel, the teacher a BertModel"):
        build(tiny_bert, path=str(tmp_path))


@pytest.mark.parametrize("damage", ["no weights", "no config", "broken weights", "no folder"])
def test_student_path_that_cannot_be_loaded(damage, checkpoint, tiny_bert, build):
    """A student that starts at random, or a traceback of a loader."""
    weights = checkpoint / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        (checkpoint / "config.json").unlink()
    elif damage == "broken weights":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        shutil.rmtree(checkpoint)
    with pytest.raises(ExperimentError, match=r"student\.path") as caught:
        build(tiny_bert, path=str(checkpoint))
    assert "Traceback" not in str(caught.value)


def test_checkpoint_with_a_task_head_gives_its_encoder(tiny_bert, tiny_tokenizer, tmp_path):
    """A fine-tuned teacher that cannot be gone on from, or comes with another's dropout."""
    config = copy.deepcopy(tiny_bert.config)
    config.num_labels, config.hidden_dropout_prob = 3, 0.3
    torch.manual_seed(8)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    encoder, tokenizer = load_checkpoint(str(tmp_path))
    assert type(encoder) is BertModel
    expected = model.bert.state_dict()
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in encoder.state_dict().items())
    assert encoder.embeddings.dropout.p == 0.3
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


# What distillation leaves, and sizes


def test_untrained_parameters_of_bert(tiny_bert, build):
    """Weights that are said to be trained and are not, or the other way round."""
    encoder = build(tiny_bert, num_layers=3)
    untrained = untrained_parameters(StateTap(encoder, qkv_states(3)))
    last = "encoder.layer.2."
    after_states = (f"{last}attention.output.", f"{last}intermediate.", f"{last}output.", "pooler.")
    names = [name for name, _ in encoder.named_parameters()]
    assert untrained == [name for name in names if name.startswith(after_states)]
    assert len(untrained) == 12
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_parameters_are_counted_as_in_the_papers(tiny_tokenizer, build):
    """A pooler counted, or embeddings among the Transformer's parameters (MiniLM, Table 4)."""
    with torch.device("meta"):
        teacher = BertModel(BertConfig())
        encoder = build(teacher, 12, num_layers=6, hidden_size=384, num_attention_heads=12)
        counts = count_parameters(encoder)
        # Columns Trm and Emd; without positions, types and norms the embedding is 30522 x 384.
        assert round(counts.transformer / 1e6, 1) == 10.6
        assert counts.embedding == 30522 * 384
        assert round(counts.embedding / 1e6, 1) == 11.7
        assert round(counts.total / 1e6, 1) == 22.6
        encoder = build(teacher, 12, num_layers=6, hidden_size=768, num_attention_heads=12)
        counts = count_parameters(encoder)
        assert round(counts.total / 1e6) == 66
        assert round(counts.embedding / 1e6, 1) == 23.4
        assert round(counts.transformer / 1e6, 1) == 42.5


def test_parameters_of_shared_layers_are_counted_once(make_teacher):
    """ALBERT refused in a report, or its one layer counted several times."""
    teacher = make_teacher("albert", embedding_size=8)
    counts = count_parameters(teacher)
    in_layers = sum(p.numel() for p in teacher.encoder.parameters())
    assert counts.transformer == in_layers < counts.total
    assert counts.embedding == 8 * teacher.config.vocab_size


def test_a_relation_that_is_left_out_trains_nothing(tiny_bert, build):
    """Weights that no gradient reaches, in the optimiser and off the model card."""
    encoder = build(tiny_bert, num_layers=3)
    untrained = untrained_parameters(StateTap(encoder, [State("value", 3)]))
    last = "encoder.layer.2.attention.self."
    assert f"{last}query.weight" in untrained
    assert f"{last}key.weight" in untrained
    assert f"{last}value.weight" not in untrained
