"""What the pipeline does around a run, and runs that only fine-tune."""

import json
import shutil
from pathlib import Path

import pyarrow
import pytest
from mlflow import MlflowClient
from pyarrow import parquet

from minilm_exp import downstream, pipeline
from minilm_exp.errors import ExperimentError
from minilm_exp.pipeline import run_experiment
from minilm_exp.result import Result, read_result


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=bert_base"], "teacher.path"),
        (["runtime=gpu"], "runtime=cpu"),
        (["task=mrpc", "data_root=/nowhere"], "data_root=/nowhere"),
        (["baseline=bert_base", "baseline.model_type=bird"], "baseline.model_type=bird"),
    ],
    ids=["teacher out of reach", "no such device", "no data", "no such architecture"],
)
def test_run_that_cannot_start_is_recorded(overrides, message, settings_for):
    """A failed run that nobody sees in the comparison."""
    settings = settings_for(*overrides)
    with pytest.raises(ExperimentError, match=message):
        run_experiment(settings)
    client = MlflowClient(tracking_uri=settings.tracking.uri)
    experiment = client.get_experiment_by_name("minilm_exp")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert message in run.data.tags["error"]
    assert run.data.params["teacher"] == settings.teacher.name


# Runs that only fine-tune


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder for all of these; a database takes seconds to make."""
    return tmp_path_factory.mktemp("finetune") / "outputs"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for task, columns in (("mrpc", 2), ("cola", 1), ("stsb", 2)):
        folder = root / "glue" / task
        folder.mkdir(parents=True)
        names = ["sentence1", "sentence2"] if columns == 2 else ["sentence"]
        for split, number in (("train", 16), ("validation", 12)):
            table = {name: [f"the model {i} of {name}" for i in range(number)] for name in names}
            table["label"] = [float(i) if task == "stsb" else i % 2 for i in range(number)]
            parquet.write_table(pyarrow.table(table), folder / f"{split}.parquet")
    return root


@pytest.fixture
def finetuning(settings_for, outputs, data_root, tiny_teacher_folder):
    """Settings that fine-tune the tiny checkpoint; each test has a seed of its own."""

    def made(*overrides):
        return settings_for(
            "experiment=smoke",
            "recipe=finetune",
            f"student.path={tiny_teacher_folder}",
            f"data_root={data_root}",
            f"outputs_dir={outputs}",
            *overrides,
        )

    return made


@pytest.fixture
def children(outputs):
    def found(run_id):
        client = MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")
        experiment = client.get_run(run_id).info.experiment_id
        runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
        return sorted(runs, key=lambda run: run.info.start_time)

    return found


@pytest.fixture
def trained(monkeypatch):
    """Tasks and seeds of what is fine-tuned; raises what it is told to, instead."""
    finetune = downstream.finetune

    class Recording(list):
        def __init__(self):
            super().__init__()
            self.errors = {}

        def __call__(self, encoder, tokenizer, job, *arguments, **named):
            self.append((job.name, job.seed))
            if (job.name, job.seed) in self.errors:
                raise self.errors[job.name, job.seed]
            return finetune(encoder, tokenizer, job, *arguments, **named)

    recording = Recording()
    monkeypatch.setattr(downstream, "finetune", recording)
    return recording


def test_interrupted_fine_tuning_goes_on(finetuning, children, trained, outputs):
    """A resumed run trains everything again, or under another id; or a model is lost."""
    given = ["task=[mrpc,cola]", "seed=11", "task_training.num_seeds=2"]
    trained.errors = {("cola", 11): KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_experiment(finetuning(*given))
    [file] = outputs.glob("runs/*-seed11-*/result.json")
    left = json.loads(file.read_text())
    assert left["status"] == "KILLED"
    # What was finished is written down at once.
    assert list(left["scores"]) == ["mrpc"]
    assert trained == [("mrpc", 11), ("mrpc", 1011), ("cola", 11)]
    trained.clear()
    trained.errors = {}
    result = run_experiment(finetuning(*given, "resume=true"))
    assert trained == [("cola", 11), ("cola", 1011)]
    assert (result.run_id, result.status) == (left["run_id"], "FINISHED")
    assert result.folder == left["folder"]
    assert result.scores["mrpc"] == left["scores"]["mrpc"]
    statuses = [child.info.status for child in children(result.run_id)]
    assert statuses == ["FINISHED"] * 4
    models = {path.name for path in (Path(result.folder) / "models").iterdir()}
    assert models == {"mrpc-student", "cola-student"}
    trained.clear()
    assert run_experiment(finetuning(*given)).run_id == result.run_id
    assert trained == []


def test_resumed_run_knows_how_it_began(finetuning, trained, outputs, monkeypatch):
    """A run that a changed tree began passes for one of a commit, or loses its first hours."""
    tree = {"commit": "c0ffee", "dirty": "true", "diff": ""}
    monkeypatch.setattr(pipeline, "git_state", lambda: tree)
    given = ["task=mrpc", "seed=14"]
    trained.errors = {("mrpc", 14): KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_experiment(finetuning(*given))
    [file] = outputs.glob("runs/*-seed14-*/result.json")
    left = json.loads(file.read_text())
    assert left["made_by"]["git_dirty"] == "true" and left["elapsed_seconds"] > 0
    # As after SIGKILL: the last that was written is from before the training.
    file.write_text(json.dumps(left | {"status": "RUNNING", "elapsed_seconds": 1000.0}))
    trained.errors = {}
    tree["dirty"] = "false"
    result = run_experiment(finetuning(*given, "resume=true"))
    assert result.made_by["git_dirty"] == "true"
    assert 1000 < result.elapsed_seconds < 1300


def test_failed_fine_tuning_fails_the_run(finetuning, children, trained, outputs):
    """A run that looks as if it went on, with its reason in the terminal alone."""
    trained.errors = {("cola", 12): RuntimeError("the sky fell")}
    with pytest.raises(RuntimeError, match="the sky fell"):
        run_experiment(finetuning("task=[mrpc,cola]", "seed=12"))
    [file] = outputs.glob("runs/*-seed12-*/result.json")
    result = json.loads(file.read_text())
    assert result["status"] == "FAILED"
    assert result["error"] == "RuntimeError: the sky fell"
    client = MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")
    run = client.get_run(result["run_id"])
    assert run.info.status == "FAILED"
    assert "the sky fell" in run.data.tags["error"]
    assert "task/mrpc/accuracy" in run.data.metrics
    assert [child.info.status for child in children(run.info.run_id)] == ["FINISHED", "FAILED"]


def test_finished_run_without_its_models_runs_again(finetuning, trained):
    """A finished run given as the answer although the models that were asked for are gone."""
    first = run_experiment(finetuning("task=mrpc", "seed=13"))
    for path in sorted((Path(first.folder) / "models").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (Path(first.folder) / "models").rmdir()
    trained.clear()
    again = run_experiment(finetuning("task=mrpc", "seed=13"))
    assert again.run_id != first.run_id
    assert trained == [("mrpc", 13)]
    assert (Path(again.folder) / "models" / "mrpc-student" / "model.safetensors").is_file()
    assert again.scores == first.scores


def test_teacher_alone_is_scored(finetuning, tiny_teacher_folder):
    """The teacher's scores under the student's name, or a sweep over teachers without a score."""
    teacher = ["teacher=custom", f"teacher.path={tiny_teacher_folder}"]
    settings = finetuning("task=mrpc", "seed=14", "recipe.models=[teacher]", *teacher)
    result = run_experiment(settings)
    assert result.scores == {} and result.undistilled_scores == {}
    assert list(result.teacher_scores) == ["mrpc"]
    assert result.score == result.teacher_scores["mrpc"]
    assert set(result.parameters) == {"teacher"}
    assert result.speedup is None and result.validation_loss is None
    assert result.meaningful


def test_speed_is_measured_beside_the_baseline(finetuning):
    """A speedup over the teacher under the name of BERT-base, as the papers give it."""
    teacher = ["recipe.models=[teacher]", "teacher=tiny_random", "student.path=null"]
    shape = ["baseline=bert_base", "baseline.name=tiny", "baseline.num_layers=3",
             "baseline.hidden_size=24", "baseline.intermediate_size=48", "baseline.num_batches=2",
             "baseline.vocab_size=50"]  # fmt: skip
    result = run_experiment(finetuning("task=mrpc", "seed=15", *teacher, *shape))
    assert result.baseline == "tiny"
    assert result.speedup > 0
    assert set(result.parameters) == {"teacher", "baseline"}
    assert result.parameters["baseline"]["embedding"] == 50 * 24


def test_checkpoint_of_a_random_teacher_is_not_meaningful(
    finetuning, tiny_teacher_folder, tmp_path
):
    """A fine-tuned smoke run that stands among results."""
    folder = tmp_path / "a run"
    shutil.copytree(tiny_teacher_folder, folder / "student")
    made_by = Result("0" * 32, "a key", "FINISHED", str(folder), meaningful=False)
    made_by.write()
    result = run_experiment(finetuning("task=mrpc", "seed=17", f"student.path={folder}/student"))
    assert not result.meaningful


def test_student_of_a_stage_belongs_to_its_run(finetuning, children, tiny_teacher_folder, tmp_path):
    """An assistant of a random teacher whose scores look meaningful."""
    folder = tmp_path / "a run"
    shutil.copytree(tiny_teacher_folder, folder / "stages" / "assistant" / "student")
    Result("0" * 32, "a key", "FINISHED", str(folder), meaningful=False).write()
    path = f"student.path={folder}/stages/assistant/student"
    assert not run_experiment(finetuning("task=mrpc", "seed=19", path)).meaningful


def test_result_of_an_earlier_version_is_read(tmp_path):
    """Old results taken for none, so that their runs are not found again."""
    Result("id", "key", "FINISHED", str(tmp_path), False, validation_loss=0.3).write()
    file = tmp_path / "result.json"
    file.write_text(file.read_text().replace("validation_loss", "validation_relation_loss"))
    found = read_result(tmp_path)
    assert found is not None
    assert (found.validation_loss, found.meaningful) == (0.3, False)
    file.write_text("[1]")
    assert read_result(tmp_path) is None


def test_similarity_needs_no_model_to_be_finished(finetuning, trained):
    """Embeddings scored again with every call, because no fine-tuned model was kept."""
    first = run_experiment(finetuning("task=stsb_similarity", "seed=20"))
    assert set(first.metrics["student"]["stsb_similarity"]) == {"spearman", "pearson"}
    again = run_experiment(finetuning("task=stsb_similarity", "seed=20"))
    assert again.run_id == first.run_id
    third = run_experiment(
        finetuning("task=stsb_similarity", "seed=21", "task_training.num_seeds=3")
    )
    assert third.scores == first.scores and third.spreads == {}
    assert trained == []


def test_params_are_those_that_were_read(finetuning, outputs):
    """Columns of the comparison that show settings of a distillation that did not happen."""
    result = run_experiment(finetuning("task=mrpc", "seed=18"))
    client = MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")
    groups = {name.split(".")[0] for name in client.get_run(result.run_id).data.params}
    assert groups == {"baseline", "precision", "recipe", "seed", "student", "task_training",
                      "tasks"}  # fmt: skip


def test_score_of_a_distillation_is_never_the_teachers():
    """A sweep over relations that maximises what no relation changes."""
    result = Result("id", "key", "RUNNING", "folder", True, teacher_scores={"mrpc": 0.9})
    assert result.score == 0.9
    result.validation_loss = 0.3
    assert result.score == -0.3
    result.scores["mrpc"] = 0.8
    assert result.score == 0.8


def test_corpus_gives_its_task_without_distilling(finetuning, tmp_path):
    """The task that is made from the corpus refused, or made from other documents than before."""
    documents = ["\n".join(f"Here {d} stands passage {p}." for p in range(9)) for d in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents) + "\n")
    corpus = ["corpus=text_files", f"corpus.files=[{tmp_path}/text.txt]"]
    more = ["corpus.held_out_fraction=0.6", "tasks.next_passage.passage_characters=20"]
    result = run_experiment(finetuning("task=next_passage_smoke", "seed=16", *corpus, *more))
    assert list(result.scores) == ["next_passage"]
