"""The student's shape by budget, on this machine."""

import json
import shutil

import pytest
import torch

from minilm_exp import sizing
from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import run_key
from minilm_exp.sizing import settings_of as sized
from tests.running import assert_told_simply, results, run, small_text


@pytest.fixture
def config_for(compose_config, tiny_teacher_folder, tmp_path):
    """A run with a budget; the teacher is a BERT of 4 layers and 32 dimensions."""

    def composed(*overrides):
        config = compose_config(
            "experiment=compress", f"teacher.path={tiny_teacher_folder}",
            f"corpus.files=[{small_text(tmp_path)}]", "corpus.block_length=32", *overrides,
        )  # fmt: skip
        config.outputs_dir = str(tmp_path / "outputs")
        return config

    return composed


@pytest.fixture
def clock(monkeypatch):
    """Every model takes a second for each layer, and as much for its embeddings."""
    calls = []

    def seconds(model, batch):
        calls.append((model, batch["input_ids"].shape))
        assert not model.training and not torch.is_grad_enabled()
        return (1 + model.config.num_hidden_layers) * model.config.hidden_size / 32

    monkeypatch.setattr(sizing, "seconds_of", seconds)
    return calls


def test_largest_that_meets_it_is_taken(config_for, clock):
    """A budget that leaves the shape as it was, or another shape than the table says."""
    settings = sized(config_for("student.budget.speedup=1.6"))
    student = settings.student
    assert (student.num_layers, student.hidden_size, student.num_attention_heads) == (2, 32, 4)
    assert student.intermediate_size == settings.teacher.intermediate_size
    assert student.init == "teacher_layers"
    chosen = [row for row in settings.candidates if row["chosen"]]
    assert len(chosen) == 1 and chosen[0]["num_layers"] == 2
    assert chosen[0]["speedup"] == pytest.approx(5 / 3, abs=1e-3)
    assert "2 x 32" in settings.notes[0] and "student.num_layers=2" in settings.notes[0]


def test_teacher_and_candidates_read_the_same_batches_in_turn(config_for, clock):
    """Speeds from different minutes."""
    settings = sized(config_for("student.budget.speedup=1.6"))
    number = len(settings.candidates) + 1
    rounds = [clock[start : start + number] for start in range(0, len(clock), number)]
    assert len(rounds) > 5
    for one in rounds:
        assert len({shape for _, shape in one}) == 1
        assert [id(model) for model, _ in one] == [id(model) for model, _ in rounds[0]]
    assert clock[0][0].config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        (["student.budget.latency_ms=100000"], (1, 64)),  # cut at the teacher's positions
        (["student.budget.latency_ms=100000", "student.budget.batch_size=3"], (3, 64)),
        (
            ["student.budget.speedup=1.5", "student.budget.batch_size=2",
             "student.budget.sequence_length=20"],
            (2, 20),
        ),
    ],
)  # fmt: skip
def test_batch_is_the_one_that_was_asked_for(config_for, clock, overrides, shape):
    """A latency of other sequences than are served."""
    sized(config_for(*overrides))
    assert {tuple(seen) for _, seen in clock} == {shape}


def test_threads_are_those_of_the_budget_and_put_back(config_for, monkeypatch):
    """A latency for one thread that was measured with two, or a run that stays slow."""
    seen = set()

    def seconds(model, batch):
        seen.add(torch.get_num_threads())
        return 1.0 / model.config.num_hidden_layers

    monkeypatch.setattr(sizing, "seconds_of", seconds)
    before = torch.get_num_threads()
    with pytest.raises(ExperimentError, match="none of the"):
        sized(config_for("student.budget.speedup=90", "student.budget.threads=3"))
    assert seen == {3} and torch.get_num_threads() == before


def test_repeated_command_has_the_same_student(config_for, clock, monkeypatch):
    """A finished run that is made again because the machine was busy."""
    first = sized(config_for("student.budget.speedup=1.6"))
    measured = len(clock)
    again = sized(config_for("student.budget.speedup=1.6"))
    assert len(clock) == measured
    assert again.candidates == first.candidates
    # Another budget is another choice from the same table.
    other = sized(config_for("student.budget.speedup=2.2", "student.budget.params=14k"))
    assert len(clock) == measured and other.candidates[0]["milliseconds"] > 0
    sized(config_for("student.budget.speedup=1.6", "student.budget.remeasure=true"))
    assert len(clock) == 2 * measured


def test_parameters_alone_need_no_timing(config_for, clock):
    """Minutes of measuring for what can be counted."""
    settings = sized(config_for("student.budget.params=14k"))
    assert len(clock) == 3 * (len(settings.candidates) + 1)


def test_damaged_record_is_measured_again(config_for, clock, tmp_path):
    """A half-written file that stops every run."""
    sized(config_for("student.budget.speedup=1.6"))
    measured = len(clock)
    for file in (tmp_path / "outputs" / "budgets").glob("*.json"):
        file.write_text(json.dumps([{"shape": 1}]))
    sized(config_for("student.budget.speedup=1.6"))
    assert len(clock) == 2 * measured


def test_key_is_that_of_the_shape(config_for, clock):
    """A run of the same student that is not found because its budget was written otherwise."""
    keys = {
        run_key(sized(config_for(*overrides)), "fp32", {})
        for overrides in (
            ["student.budget.speedup=1.6"],
            ["student.budget.speedup=1.62"],
            ["student=l3h384", "student.num_layers=2", "student.hidden_size=32",
             "student.init=auto", "student.num_attention_heads=4", "student.intermediate_size=48"],
        )
    }  # fmt: skip
    assert len(keys) == 1


def test_relation_heads_are_adapted(config_for, clock):
    """A shape that is refused because 48 does not divide its width."""
    settings = sized(config_for("student.budget.speedup=1.2", "student.budget.hidden_sizes=[24]"))
    assert settings.student.hidden_size == 24
    assert settings.relation_set.num_relation_heads == 8
    assert any("8 relation heads" in note and "divides both" in note for note in settings.notes)


def test_wide_alternative_is_named(config_for, clock):
    """An engineer with an afternoon who trains random weights without knowing it."""
    settings = sized(
        config_for(
            "student.budget.params=100k",
            "student.budget.hidden_sizes=[32,24]",
            "student.budget.num_layers=[1,4]",
        )
    )
    assert (settings.student.num_layers, settings.student.hidden_size) == (4, 24)
    assert settings.student.init == "random"
    assert any("1 x 32" in note and "hidden_sizes=[32]" in note for note in settings.notes)


@pytest.mark.parametrize(
    ("overrides", "typed", "words"),
    [
        ([], set(), "needs a budget"),
        (["student.budget.speedup=2", "student.num_layers=2"], {"student.num_layers"}, "leave out"),
        (["student.budget.speedup=2", "student=l3h384"], {"student"}, "leave out"),
        (["student.budget.speedup=2", "student.path=somewhere"], set(), "student.path and"),
        (["student.budget.speedup=0.5"], set(), "must be a finite number above 1"),
        (["student.budget.params=20X"], set(), "no number of parameters"),
        (["student.budget.latency_ms=1", "student.budget.sequence_length=65"], set(), "64"),
        (["student.budget.speedup=1000000"], set(), "none of the"),
        (["student.budget.speedup=2", "student.budget.batch_size=99999"], set(), "is not timed"),
        (["student.budget.speedup=2", "student.budget.threads=9999"], set(), "must not be above"),
        (["student.budget.speedup=[2]"], set(), "speedup.*Float"),
    ],
)
def test_what_does_not_fit_is_refused(config_for, clock, overrides, typed, words):
    """A budget that is ignored, or found wrong after the measuring."""
    with pytest.raises(ExperimentError, match=words):
        sized(config_for(*overrides), True, typed)


def test_cut_vocabulary_counts(config_for, clock):
    """A budget of parameters that is met only without the embeddings of the corpus."""
    whole = sized(config_for("student.budget.params=100k"))
    cut = sized(config_for("student.budget.params=100k", "student.vocabulary=prune_to_corpus"))
    sizes = [
        {(row["num_layers"], row["hidden_size"]): row["parameters"] for row in one.candidates}
        for one in (whole, cut)
    ]
    assert all(sizes[1][shape] < sizes[0][shape] for shape in sizes[0])


def test_candidates_share_memory(config_for, clock):
    """Dozens of copies of a large teacher's layers."""
    sized(config_for("student.budget.speedup=1.6"))
    wide = [m for m, _ in clock if m.config.hidden_size == 32 and m.config.num_hidden_layers < 4]
    first = {id(m): m.get_input_embeddings().weight.data_ptr() for m in wide}
    assert len(first) > 1 and len(set(first.values())) == 1


@pytest.mark.integration
def test_whole_way(tiny_teacher_folder, tmp_path):
    """The command of the README: measured, chosen, distilled, and found again."""
    outputs = tmp_path / "outputs"
    overrides = [
        "experiment=compress", f"teacher.path={tiny_teacher_folder}",
        f"corpus.files=[{small_text(tmp_path)}]", "student.budget.params=16k",
        "student.budget.search=quick", "student.budget.search_share=0.6",
        "training.max_steps=50", "training.warmup_steps=1", "corpus.block_length=16",
        "corpus.held_out_fraction=0.3", "training.batch_size=4",
    ]  # fmt: skip
    done = run(outputs, *overrides)
    assert done.status == 0, done.both
    assert "shapes that were measured" in done.stdout and "chosen" in done.stdout
    assert "quick search" in done.stdout and "learning rate 0.0012" in done.stdout
    found = results(outputs)
    final = [result for result in found.values() if result["candidates"]]
    # Two short runs, compared by their losses as the text has no passages, and the run itself.
    assert len(found) == 3
    chosen = next(one for one in final[0]["candidates"] if one["chosen"])
    config = json.loads(
        next(outputs.glob(f"runs/*{final[0]['run_key'][:10]}/student/config.json")).read_text()
    )
    assert config["num_hidden_layers"] == chosen["num_layers"]
    shutil.rmtree(outputs / "cache")
    again = run(outputs, *overrides)
    assert again.status == 0 and again.both.count("already finished") == len(found), again.both
    assert len(results(outputs)) == len(found)


@pytest.mark.integration
def test_several_processes_do_not_time_each_other(tiny_teacher_folder, tmp_path):
    """Two processes with different students."""
    done = run(
        tmp_path / "outputs", "experiment=compress", f"teacher.path={tiny_teacher_folder}",
        f"corpus.files=[{small_text(tmp_path)}]", "student.budget.params=16k",
        WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
    )  # fmt: skip
    assert_told_simply(done, "student.budget", "torchrun")
