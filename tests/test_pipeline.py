"""What the pipeline does around a run."""

import pytest
from mlflow import MlflowClient

from minilm_exp.errors import ExperimentError
from minilm_exp.pipeline import run_experiment


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=bert_base"], "teacher.path"),
        (["runtime=gpu"], "runtime=cpu"),
    ],
    ids=["teacher out of reach", "no such device"],
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
