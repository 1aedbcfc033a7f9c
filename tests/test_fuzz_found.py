"""What hostile input has broken once."""

import json

import pytest
from omegaconf import OmegaConf

from minilm_exp.errors import ExperimentError
from minilm_exp.parsing import parse
from minilm_exp.teacher_facts import read_facts


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("objective", "minilmv2", r"objective='minilmv2' is no group of settings"),
        ("recipe", 5, r"recipe=5 is no group"),
        ("tasks", ["sst2"], r"tasks=\['sst2'\] is no group"),
        ("teacher", None, r"teacher=None is no group"),
        ("recipe.stages", [1], r"recipe\.stages=\[1\] must be stages by name"),
        ("recipe.stages", {"one": 1}, r"recipe\.stages\.'one'=1 must be settings of a stage"),
        ("training", [1], "training|ncompatible|list"),
        ("tasks.next_passage", 5, r"tasks\.next_passage: "),
        ("objective.terms.relations.kind", {"a": 1}, r"kind=\{'a': 1\} is not one of"),
        ("student.path", "é" * 300, "does not exist here"),
        ("student.config", "~nobody-at-all/x", "does not exist here"),
        ("data_root", "a\0b", "is no text"),
        ("corpus.files", ["\ud800"], "is no text"),
        ("corpus.text_column", "x" * 5000, "is no text"),
        ("student.num_layers", 2**63, r"student\.num_layers=\d+ must not be above 10000"),
        ("task_training.num_seeds", 2**63, r"num_seeds=\d+ must not be above 10000"),
        ("runtime.num_threads", 2**31, r"num_threads=\d+ must not be above 4096"),
        ("baseline.batch_size", 2**40, r"batch_size=\d+ must not be above 2147483647"),
    ],
)
def test_values_that_were_answered_with_a_traceback(name, value, message, compose_config):
    """A traceback, or a loop that does not end, for a value of another kind or size."""
    config = compose_config("experiment=smoke")
    OmegaConf.update(config, name, value, merge=False, force_add=True)
    with pytest.raises(ExperimentError, match=message):
        parse(config)


@pytest.mark.parametrize(
    "name, value",
    [("hidden_size", "32"), ("hidden_size", [32]), ("num_hidden_layers", 0), ("vocab_size", -1),
     ("vocab_size", 2**40), ("num_attention_heads", True), ("model_type", ["bert"])],
)  # fmt: skip
def test_sizes_in_a_config_json_are_sizes(name, value, tmp_path):
    """Text or nothing taken for a size, and an error of arithmetic later."""
    facts = {"model_type": "bert", "vocab_size": 9, "num_hidden_layers": 2, "hidden_size": 4,
             "num_attention_heads": 2, "max_position_embeddings": 9}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(facts | {name: value}))
    with pytest.raises(ExperimentError, match=r"is no size|is no name"):
        read_facts(str(tmp_path), None)


def test_a_config_json_that_is_too_deep_is_refused(tmp_path):
    """An error of recursion in the JSON reader."""
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ExperimentError, match="not valid JSON"):
        read_facts(str(tmp_path), None)


@pytest.mark.parametrize("package", ["os.path", ".minilm_exp", "a b", "", "antigravity.x"])
def test_a_package_is_a_plain_name(package):
    """A parent package that is imported, or a traceback of the import system."""
    from minilm_exp.teacher import package_folder

    with pytest.raises(ExperimentError, match="which is not installed"):
        package_folder(package)
