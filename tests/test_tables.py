"""Tables and figures of sweeps: what they say, what they refuse, and whether they could mislead."""

import csv
import io
import itertools
import re
import shutil
import statistics
from pathlib import Path

import pytest
from conftest import REPOSITORY
from scipy import stats

from minilm_exp.errors import ExperimentError
from minilm_exp.figures import draw
from minilm_exp.figures import main as figures_main
from minilm_exp.paper import paper_tables, paper_value
from minilm_exp.pareto import on_front
from minilm_exp.provenance import RESULTS_VERSION
from minilm_exp.result import Result
from minilm_exp.sweep_record import Runs, open_record
from minilm_exp.table_data import Measured, collect, find_records
from minilm_exp.table_spec import read_spec
from minilm_exp.tables import comma_separated, entries, footer, headings, latex, main, markdown

SPECS = sorted((REPOSITORY / "sweeps").glob("*.table"))
MADE_BY = {
    "git_commit": "c0ffee",
    "git_dirty": "false",
    "results_version": str(RESULTS_VERSION),
    "precision": "bf16",
    "device": "a processor",
    "input.corpus": "a text",
}
SCORES = {"qq_kk_vv": [0.80, 0.81, 0.82], "kk_vv": [0.70, 0.71, 0.72], "qq": [0.79, 0.83, 0.80]}


class Outputs:
    """The outputs of a sweep that never ran."""

    def __init__(self, root, sweep="relation_set", layers=12):
        self.root, self.sweep, self.layers = root, sweep, layers
        self.name = f"{sweep}-1"

    def add(self, values, scores, **changes):
        key = f"{len(list(self.root.glob('runs/*'))):010d}{'a' * 54}"
        folder = self.root / "runs" / f"run-{key}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"teacher: {{num_layers: {self.layers}}}")
        made_by = MADE_BY | changes.pop("made_by", {})
        given = {"status": "FINISHED", "meaningful": True, "scores": scores, "speedup": 2.0}
        given |= {"parameters": {"student": {"transformer": 5_300_000}}, "elapsed_seconds": 360.0}
        result = Result(run_id=f"r{key}", run_key=key, folder=str(folder), **(given | changes))
        result.made_by = made_by
        result.write()
        with open_record(self.root, self.sweep, self.name) as record:
            record.commands = [["run.py", "-m", f"sweeps={self.sweep}"]]
            cell = record.cell({"seed": "1"} | values)
            cell.run_key = key
        return result

    def table(self, allow_mixed=False, without=()):
        spec = read_spec(REPOSITORY / "sweeps" / f"{self.sweep}.table")
        runs = Runs(self.root)
        record = find_records(self.root, self.sweep, runs)[0]
        return collect(record, spec, runs, allow_mixed, without)


@pytest.fixture
def outputs(tmp_path):
    made = Outputs(tmp_path)
    for relations, scores in SCORES.items():
        for seed, score in enumerate(scores, start=1):
            both = {"mnli": score, "qnli": score / 2}
            made.add({"relations": relations, "seed": str(seed)}, both)
    return made


def texts(data):
    return [
        [f"{t.plain} **{t.bold}**" if t.bold else t.plain for t in row] for row in entries(data)
    ]


# Numbers


def test_numbers(outputs):
    """A spread of the population, a difference to another row, bold without a difference."""
    data = outputs.table()
    assert headings(data) == [
        "", "n", "MNLI-m", "MNLI-m, paper", "qnli", "Mean", "SQuAD 2.0, paper", "SST-2, paper",
        "Mean, paper",
    ]  # fmt: skip
    first, second, third = texts(data)
    assert first[:6] == ["Q-Q + K-K + V-V", "3", "81.0 ± 1.0", "82.2", "40.5 ± 0.5", "60.8 ± 0.7"]
    assert second[:5] == [
        "K-K + V-V", "3", "71.0 ± 1.0 **(-10.0)**", "81.9 (-0.3)", "35.5 ± 0.5 **(-5.0)**"
    ]  # fmt: skip
    # A set that the paper lacks, whose spread is larger than its difference.
    assert third[:5] == ["qq", "3", "80.7 ± 2.1 (-0.3)", "-", "40.3 ± 1.0 (-0.2)"]
    assert second[6:] == ["71.6 (-1.2)", "90.6 (-0.9)", "81.4 (-0.8)"]


def test_difference_is_welchs_test():
    """Bold by a test that takes equal variances for granted, or with one seed."""
    # A test that takes equal variances for granted finds no difference in the last pair.
    pairs = [*itertools.product(SCORES.values(), repeat=2)]
    pairs.append(([0.50, 0.51, 0.49, 0.50, 0.505, 0.495, 0.50], [0.52, 0.53]))
    for first, second in pairs:
        p = stats.ttest_ind(first, second, equal_var=False).pvalue
        assert Measured(first).differs_from(Measured(second)) == (p < 0.05)
    assert not Measured([0.9]).differs_from(Measured([0.1, 0.1]))
    assert not Measured([0.5, 0.5]).differs_from(Measured([0.5, 0.5]))
    assert Measured([0.5, 0.5]).differs_from(Measured([0.6, 0.6]))


def test_papers_mean_stands_beside_the_same_tasks_only(tmp_path):
    """The paper's mean of three tasks beside ours of two others."""
    made = Outputs(tmp_path)
    for seed in "12":
        scores = {"squad_v2": 0.7, "mnli": 0.8, "sst2": 0.9}
        made.add({"relations": "qq_kk_vv", "seed": seed}, scores)
    names = headings(made.table())
    assert names[-2:] == ["Mean", "Mean, paper"] and "SST-2, paper" in names


def test_single_seed_has_no_spread(tmp_path):
    """± 0.0, as if nothing varied."""
    made = Outputs(tmp_path)
    made.add({"relations": "qq_kk_vv"}, {"mnli": 0.5})
    made.add({"relations": "kk_vv"}, {"mnli": 0.9})
    assert texts(made.table())[1][1:3] == ["1", "90.0 (+40.0)"]
    text = footer(made.table())[0]
    assert "One seed has no spread" in text and "±" not in text and "Welch" not in text


def test_footer(outputs):
    """A table whose origin nobody can find again."""
    text = "\n".join(footer(outputs.table()))
    for part in ("seeds 1, 2, 3: mean ± standard deviation", "Welch",
                 "Command: python run.py -m sweeps=relation_set",
                 "9 of 9 cells", "0.90 hours", "precision bf16", "a processor", "c0ffee",
                 "MiniLMv2 Table 7", "other settings"):  # fmt: skip
        assert part in text
    assert "NOT MEANINGFUL" not in text and "MIXED" not in text
    outputs.add({"relations": "vv", "seed": "1"}, {"mnli": 0.5, "qnli": 0.5}, meaningful=False)
    assert "NOT MEANINGFUL" in "\n".join(footer(outputs.table(allow_mixed=True)))


def test_formats_say_the_same(outputs):
    """A row lost in one of them, or LaTeX that does not compile for a percent sign."""
    data = outputs.table()
    lines = [line for line in markdown(data).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and "**(-10.0)**" in lines[3]
    assert {line.count("|") for line in lines} == {10}
    text = latex(data)
    assert text.count(r"\\") == 4 and r"\textbf{($-$10.0)}" in text and r"$\pm$" in text
    assert not re.search(r"(?<!\\)[%#_&](?! )", text.replace("&", "& "))
    rows = list(csv.DictReader(io.StringIO(comma_separated(data))))
    row = next(r for r in rows if r["relations"] == "kk_vv" and r["column"] == "mnli")
    assert float(row["mean"]) == 71 and row["n"] == "3"
    assert float(row["std"]) == pytest.approx(100 * statistics.stdev(SCORES["kk_vv"]))
    assert (row["paper"], row["paper_table"]) == ("81.9", "MiniLMv2 Table 7")
    assert row["values"] == "70 71 72" and row["differs"] == "true"


# What it refuses


def damage(outputs, result):
    (Path(result.folder) / "result.json").write_text('{"run_id": ')


def remove(outputs, result):
    shutil.rmtree(result.folder)


def leave_unfinished(outputs, result):
    result.status = "RUNNING"
    result.write()


def take_another(outputs, result):
    result.run_key = "f" * 64
    result.write()


def change_tree(outputs, result):
    result.made_by["git_dirty"] = "true"
    result.write()


def age(outputs, result):
    result.made_by["results_version"] = "1"
    result.write()


def change_data(outputs, result):
    result.made_by["input.corpus"] = "another text"
    result.write()


def change_precision(outputs, result):
    result.made_by["precision"] = "fp32"
    result.write()


def double(outputs, result):
    shutil.copytree(result.folder, outputs.root / "runs" / "a copy")


def fail(outputs, result):
    with open_record(outputs.root, outputs.sweep, outputs.name) as record:
        record.cells[-1].error = "the loss is not finite"


def never_run(outputs, result):
    with open_record(outputs.root, outputs.sweep, outputs.name) as record:
        record.cells[-1].run_key = None


def leave_out_seed(outputs, result):
    with open_record(outputs.root, outputs.sweep, outputs.name) as record:
        record.cells.pop()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damage, "its result is gone or damaged"),
        (remove, "its result is gone or damaged"),
        (leave_unfinished, "is RUNNING"),
        (take_another, "its result is gone or damaged"),
        (change_tree, "uncommitted changes"),
        (age, f"results version 1, this program's is {RESULTS_VERSION}"),
        (change_precision, "several kinds of precision: bf16, fp32"),
        (change_data, "another content of corpus: a text, another"),
        (double, "is there twice"),
        (fail, "failed: the loss is not finite"),
        (never_run, "has not been run to its end"),
        (leave_out_seed, "seed 2 is missing"),
    ],
)
def test_refuses_and_names(outputs, spoil, words, capsys):
    """A table of cells that do not belong together, printed as if they did."""
    outputs.add({"relations": "qk_vv", "seed": "1"}, {"mnli": 0.6, "qnli": 0.6})
    outputs.add({"relations": "qk_vv", "seed": "3"}, {"mnli": 0.6, "qnli": 0.6})
    last = outputs.add({"relations": "qk_vv", "seed": "2"}, {"mnli": 0.6, "qnli": 0.6})
    outputs.table()
    spoil(outputs, last)
    with pytest.raises(ExperimentError) as caught:
        outputs.table()
    message = str(caught.value)
    assert words in message and "--allow-mixed" in message
    if spoil not in (change_precision, change_data):
        named = "Q-K + V-V" if spoil is leave_out_seed else "seed=2 relations=qk_vv"
        assert named in message and message.count("\n  ") == 1, message
    text = markdown(outputs.table(allow_mixed=True))
    assert "MIXED OR INCOMPLETE" in text and words in text
    with pytest.raises(SystemExit, match="no table of relation_set-1"):
        main(["relation_set", "--outputs", str(outputs.root)])
    assert not (outputs.root / "tables").exists()


def test_rerun_replaces_what_it_repeats(outputs):
    """A dirty cell that no call gets rid of, or two results of one run taken for one."""
    cell = {"relations": "qk_vv", "seed": "1"}
    changed = {"git_dirty": "true"}
    for seed in "123":
        made_by = changed if seed == "1" else {}
        last = outputs.add(cell | {"seed": seed}, {"mnli": 0.1, "qnli": 0.1}, made_by=made_by)
    with pytest.raises(ExperimentError, match=r"seed=1 relations=qk_vv\. Commit the changes"):
        outputs.table()
    old = next(r for r in outputs.table(True).results if r.made_by["git_dirty"] == "true")
    again = Path(f"{old.folder}-2")
    shutil.copytree(old.folder, again)
    new = Result(**(vars(old) | {"folder": str(again), "run_id": "new", "replaces": [old.run_id]}))
    new.made_by, new.scores = MADE_BY, {"mnli": 0.9, "qnli": 0.1}
    new.status = "RUNNING"
    new.write()
    with pytest.raises(ExperimentError, match="uncommitted"):
        outputs.table()
    new.status = "FINISHED"
    new.write()
    (row,) = (row for row in outputs.table().rows if row.values["relations"] == "qk_vv")
    assert row.measured("mnli").values == [0.9, 0.1, 0.1] and last.status == "FINISHED"


def test_outputs_may_be_moved(outputs):
    """Cells that are looked for where they were, or are read there from another folder."""
    before = markdown(outputs.table())
    moved = outputs.root.with_name("moved")
    outputs.root.rename(moved)
    for folder in moved.glob("runs/*"):
        folder.rename(folder.with_name(f"renamed-{folder.name}"))
    outputs.root = moved
    assert markdown(outputs.table()) == before


def test_missing_cells_are_told_how_to_compute(outputs):
    """A row of seeds 1 and 2 where seed 3 is asked for by a call without the row."""
    for seed in "12":
        outputs.add({"relations": "vv", "seed": seed}, {"mnli": 0.5, "qnli": 0.5})
    with open_record(outputs.root, outputs.sweep, outputs.name) as record:
        record.commands.append(["run.py", "-m", "sweeps=relation_set", "x=1", "seed=1,2,3"])
    with pytest.raises(ExperimentError) as caught:
        outputs.table()
    command = "python run.py -m sweeps=relation_set x=1 outputs_dir="
    assert f"{command}{outputs.root} 'seed=choice(3)' 'relations=choice(vv)'" in str(caught.value)
    data = outputs.table(without=["relations=vv"])
    assert len(data.rows) == 3 and "Left out (--without): relations=vv" in markdown(data)
    data = outputs.table(without=["seed=3"])
    assert {len(row.results) for row in data.rows} == {2}
    for wrong, words in (("relations=kkk", "no cell"), ("n", "no cell")):
        with pytest.raises(ExperimentError, match=f"--without {wrong}: {words}"):
            outputs.table(without=[wrong])


def test_rows_stand_in_the_order_of_the_spec(outputs):
    """Another row of reference, as the last call began with another."""
    for seed in "123":
        outputs.add({"relations": "qk_vv", "seed": seed}, {"mnli": 0.5, "qnli": 0.5})
    with open_record(outputs.root, outputs.sweep, outputs.name) as record:
        record.cells.reverse()
    names = [row.values["relations"] for row in outputs.table().rows]
    assert names == ["qq_kk_vv", "kk_vv", "qk_vv", "qq"]


def test_seeds_need_not_be_numbers(outputs, capsys):
    """A traceback for a slip in a seed, or for a store that is no database."""
    with open_record(outputs.root, outputs.sweep, outputs.name) as record:
        record.uri, record.run_id = f"sqlite:///{outputs.root}/mlflow.db", "1"
        record.cell({"seed": "a", "relations": "kk_vv"}).error = "seed=a is no number"
    with pytest.raises(ExperimentError, match="seed=a is no number"):
        outputs.table()
    (outputs.root / "mlflow.db").write_bytes(b"no database" * 1000)
    main(["relation_set", "--outputs", str(outputs.root), "--without", "seed=a"])
    assert "not in MLflow: no run 1" in capsys.readouterr().out


def test_failed_call_does_not_hide_the_finished_ones(outputs, capsys):
    """The record of a sweep in which nothing worked, because it is the newest."""
    with open_record(outputs.root, outputs.sweep, "relation_set-2") as record:
        record.cell({"seed": "1", "relations": "kk"}).error = "a slip"
    main(["relation_set", "--outputs", str(outputs.root)])
    printed = capsys.readouterr().out
    assert "relation_set-1; there are also relation_set-2 (0 of 1 cells)" in printed


def test_students_of_one_shape_have_one_speed(tmp_path):
    """Noise of the clock as a trade of speed for score."""
    made = Outputs(tmp_path, "student_size")
    for layers, method, speed in (("3", "minilm", 2.0), ("3", "tinybert", 3.0), ("2", "minilm", 5)):
        sizes = {"student": {"transformer": int(layers)}}
        values = {"student.num_layers": layers, "method": method}
        made.add(values, {"mnli": 0.5}, speedup=speed, parameters=sizes, baseline="bert_base")
    data = made.table()
    speeds = [row.measured("speedup").values for row in data.rows if row.results]
    assert speeds == [[2.5], [2.5], [5]]
    assert "Speedup over bert_base" in markdown(data)
    (axes,) = draw(data).axes
    assert axes.get_xlabel() == "speedup over bert_base" and "one seed" in axes.get_ylabel()


def test_same_run_twice_is_named(outputs):
    """Two cells that are one run: a sweep over a setting that changes nothing."""
    with open_record(outputs.root, outputs.sweep, outputs.name) as record:
        for cell in record.cells[:3]:
            twin = record.cell(cell.values | {"relations": "vv"})
            twin.run_key = cell.run_key
    with pytest.raises(ExperimentError, match="are the same run"):
        outputs.table()


def test_unknown_sweep_is_named(tmp_path):
    """A traceback for a name with a slip, or no word on what there is."""
    with pytest.raises(ExperimentError, match="has no sweep relation_sets"):
        find_records(tmp_path, "relation_sets", Runs(tmp_path))


# Specs and the papers' numbers


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_spec_is_of_a_sweep(file):
    """A table without its sweep, or one whose figure cannot be drawn."""
    assert file.with_suffix(".yaml").is_file()
    spec = read_spec(file)
    assert spec.figure is not None and spec.figure.kind in ("line", "pareto", "loss", "search")


def test_every_sweep_has_a_table():
    """A sweep whose results nobody can see side by side."""
    assert {f.stem for f in SPECS} == {f.stem for f in (REPOSITORY / "sweeps").glob("*.yaml")}


PAPER = {  # tasks of the paper, and how many numbers of it stand in the table
    "relation_set": (["squad_v2", "mnli", "sst2"], {"relations": SCORES.keys() - {"qq"}}, 2 * 4),
    "relation_heads": (
        ["squad_v2", "mnli"], {"relation_set.num_relation_heads": ["6", "12", "24", "48"]}, 8,
    ),
    "teacher_layer": (
        ["squad_v2", "mnli"], {"layer_selection.teacher_layer": ["12", "11", "10", "9", "8"]}, 8,
    ),
    "more_relations": (["squad_v2", "mnli", "sst2"], {"relations": ["qq_kk_vv", "all"]}, 6),
    "student_size": (
        ["squad_v2", "mnli", "sst2"],
        {
            "student.num_layers": ["6", "4", "3"],
            "method": ["tinybert", "minilm", "minilm_assistant"],
        },
        9 * 6,
    ),
    "value_relation": (
        ["squad_v2", "mnli", "sst2"],
        {
            "student.num_layers": ["6", "4", "3"],
            "objective": ["minilmv1", "attention_only", "value_mse"],
        },
        9 * 3,
    ),
    "layer_to_layer": (
        ["squad_v2", "mnli", "sst2"],
        {"student.num_layers": ["6", "4", "3"], "objective": ["minilmv1", "layer_to_layer"]},
        6 * 4,
    ),
    "upper_middle_v1": (
        ["squad_v2", "mnli", "sst2"],
        {"method": ["minilm", "minilmv2"], "layer_selection": ["last", "upper_middle"]},
        3 * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_papers_numbers_are_found(tmp_path, name):
    """A row or column whose name differs from the paper's by a sign, and so stands without it."""
    tasks, axes, number = PAPER[name]
    made = Outputs(tmp_path, name)
    for values in itertools.product(*axes.values()):
        made.add(dict(zip(axes, values)), dict.fromkeys(tasks, 0.5))
    rows = list(csv.DictReader(io.StringIO(comma_separated(made.table()))))
    found = [row for row in rows if row["paper"] and not row["note"]]
    assert len(found) == number, [(row["row"], row["column"]) for row in found]


def test_paper_is_left_out_where_more_is_varied(outputs):
    """The paper's number for one student beside every student."""
    made = Outputs(outputs.root / "more", "more_relations")
    for student in ("l6h384", "l6h768"):
        made.add({"relations": "all", "student": student}, {"mnli": 0.5})
    assert headings(made.table()) == ["", "n", "MNLI-m"]


@pytest.fixture
def searched(tmp_path):
    """A search whose last trial failed."""
    made = Outputs(tmp_path / "searched", "search")
    for rate, score, parameters in (
        ("0.1", 0.5, 3e6), ("0.00123456", 0.6, 3e6), ("0.2", 0.55, 1e6), ("0.3", 0.1, 2e6),
        ("9", 0.7, 1e6),
    ):  # fmt: skip
        sizes = {"student": {"transformer": parameters}}
        values = {"relations": "kk", "training.learning_rate": rate}
        made.add(values, {"mnli": score}, parameters=sizes)
    with open_record(made.root, made.sweep, made.name) as record:
        record.is_grid, record.num_trials = False, 4
        record.cells[-1].error = "the loss is not finite"
    return made


def test_search_is_ordered_by_its_score(searched):
    """The best trial somewhere among the others, differences to the first, or a failed trial."""
    data = searched.table()
    names = ["rate 0.00123 *", "rate 0.2", "rate 0.1", "rate 0.3"]
    assert [row[0] for row in texts(data)] == names
    assert [row[2] for row in texts(data)] == ["60.0", "55.0", "50.0", "10.0"]
    text = markdown(data)
    assert "1 trials failed" in text and "In all rows: kk" in text and "luckiest" in text
    (axes,) = draw(data).axes
    trials, best = axes.get_lines()
    assert list(trials.get_xdata()) == [1, 2, 3, 4]
    assert list(trials.get_ydata()) == pytest.approx([50, 60, 55, 10])
    assert list(best.get_ydata()) == pytest.approx([50, 60, 60, 60])


def test_search_for_several_values(searched):
    """A front of something else than what was searched for, or its values nowhere to be seen."""
    with open_record(searched.root, searched.sweep, searched.name) as record:
        record.trial_values = ["score", "parameters"]
        record.directions = ["maximize", "minimize"]
    data = searched.table()
    rows = [(row[0], row[-1]) for row in texts(data)]
    assert headings(data)[-1] == "parameters"
    assert rows == [("rate 0.00123 *", "3.0M"), ("rate 0.2 *", "1.0M"), ("rate 0.1", "3.0M"),
                    ("rate 0.3", "2.0M")]  # fmt: skip
    (axes,) = draw(data).axes
    front = axes.get_lines()[-1]
    assert front.get_label() == "Pareto front" and list(front.get_xdata()) == [1e6, 3e6]
    assert axes.get_xlabel() == "parameters"


def test_unfinished_search_is_refused(searched):
    """The table of a killed search, which looks like that of a whole one."""
    with open_record(searched.root, searched.sweep, searched.name) as record:
        record.num_trials = 30
    with pytest.raises(ExperimentError, match="4 of 30 trials are finished"):
        searched.table()


def test_shapes_stand_beside_the_papers_by_share(tmp_path):
    """The paper's 3 layers beside our 3, where ours are a half and the paper's a quarter."""
    made = Outputs(tmp_path, "layer_to_layer", layers=6)
    for layers in "321":
        for objective in ("minilmv1", "layer_to_layer"):
            made.add({"student.num_layers": layers, "objective": objective}, {"mnli": 0.5})
    data = made.table()
    column = headings(data).index("MNLI-m, paper")
    assert [row[column].split()[0] for row in texts(data)] == [
        "82.2",
        "81.8",
        "80.3",
        "79.9",
        "78.8",
        "77.7",
    ]


def test_layers_stand_beside_the_papers_by_depth(tmp_path):
    """Layer 6 of 6 beside the paper's layer 6 of 12."""
    made = Outputs(tmp_path, "teacher_layer", layers=6)
    for layer in "654321":
        made.add({"layer_selection.teacher_layer": layer}, {"mnli": 0.5})
    data = made.table()
    column = headings(data).index("MNLI-m, paper")
    shown = [row[column].split()[0] for row in texts(data)]
    assert shown == ["82.2", "81.7", "80.2", "-", "-", "-"]
    assert "read off the figure" in "\n".join(footer(data))
    deep = Outputs(tmp_path / "deep", "teacher_layer", layers=24)
    deep.add({"layer_selection.teacher_layer": "21"}, {"mnli": 0.5})
    assert "82.6" in texts(deep.table())[0]


def test_unavailable_row_says_why(tmp_path):
    """The paper's row left out without a word, or with a number."""
    made = Outputs(tmp_path, "student_size")
    made.add({"student.num_layers": "3", "method": "minilm"}, {"mnli": 0.5})
    data = made.table()
    assert texts(data)[-1][:3] == ["MLM-KD (soft labels)", "0", "unavailable"]
    assert "unavailable, MLM-KD" in "\n".join(footer(data))
    made.add({"student.num_layers": "3", "method": "mlm_kd"}, {"mnli": 0.5})
    assert "unavailable" not in markdown(made.table())


def test_paper_tables_are_whole():
    """A row with a number too few, which shifts all others."""
    for name, table in paper_tables().items():
        assert table["source"], name
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}, name
    assert paper_value("MiniLMv2 Table 7", "Avg", {"Model": "Q-K + V-V Att-Rels"}) == 81.9
    assert paper_value("MiniLM Table 3", "MNLI-m", {"Model": "MiniLM"}) is None  # three rows
    with pytest.raises(ExperimentError, match="no column MNLI;"):
        paper_value("MiniLMv2 Table 7", "MNLI", {})
    with pytest.raises(ExperimentError, match="there is no MiniLMv2 Table 70"):
        paper_value("MiniLMv2 Table 70", "MNLI", {})


# Files and figures


def test_command_lines_write_files(outputs, capsys):
    """Tables that are printed only, or figures that are empty."""
    main(["relation_set", "--outputs", str(outputs.root)])
    written = {path.name for path in (outputs.root / "tables").iterdir()}
    assert written == {"relation_set.md", "relation_set.tex", "relation_set.csv"}
    printed = capsys.readouterr().out
    assert "not in MLflow" in printed and "K-K + V-V" in printed
    with pytest.raises(SystemExit, match="MLflow run is not known"):
        figures_main(["relation_set", "--outputs", str(outputs.root)])


def test_line_has_the_papers_points(tmp_path):
    """Curves on scales that cannot be compared, or without their spread."""
    made = Outputs(tmp_path, "teacher_layer", layers=6)
    for layer, score in zip("654321", (0.8, 0.82, 0.79, 0.7, 0.6, 0.5)):
        for seed in "123":
            values = {"layer_selection.teacher_layer": layer, "seed": seed}
            made.add(values, {"mnli": score + int(seed) / 1000})
    (axes,) = draw(made.table()).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    (paper,) = (line for label, line in lines.items() if "Figure 2a: MNLI-m" in label)
    assert list(paper.get_xdata()) == [4, 5, 6]
    assert list(paper.get_ydata()) == pytest.approx([-2.0, -0.5, 0.0])
    ours = axes.containers[0].lines[0]
    assert list(ours.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(ours.get_ydata()) == pytest.approx([-30, -20, -10, -1, 2, 0])
    assert axes.get_xlabel().startswith("teacher layer")


def test_pareto_front():
    """A point on the line that another beats."""
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (0.5, 5.0), (3.0, 4.0)]
    assert on_front(points) == [True, False, False, True, True, False, True]


def test_problems_stand_in_the_figure(tmp_path):
    """A figure of mixed cells that does not say so."""
    made = Outputs(tmp_path, "layer_to_layer")
    changed = {"made_by": {"git_dirty": "true"}}
    made.add({"student.num_layers": "3", "objective": "minilmv1"}, {"mnli": 0.5}, **changed)
    (axes,) = draw(made.table(allow_mixed=True)).axes
    assert "mixed or incomplete: 1 problems" in axes.get_title()
