"""MLflow: one run for each experiment, failed ones too."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

# MLflow phones home by default; nobody asked for that.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# A server that does not answer is reported after seconds, not minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy import NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.redaction import redact

T = TypeVar("T")
# It logs a traceback each time that a database is locked.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
# Seconds before a store that does not answer is asked again; twice as many each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
# What a store is said to be that may come back. A full disk is told at once.
_PASSING = ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")
_UNREACHABLE = "failed with exception"
_LASTING = ("disk is full", "disk I/O error", "readonly database", "unable to open")
# Tag of the runs that `Tracker.child` starts.
_PART_OF = "part_of_run"

_log = logging.getLogger(__name__)
_MAX_TAG_LENGTH = 5000
_MAX_PARAM_LENGTH = 6000


class Tracker:
    """Writes one MLflow run. Passwords in URIs and tokens are blacked out in all it writes."""

    def __init__(
        self, client: MlflowClient, run_id: str, resumed: bool, retry_seconds: float = 0
    ) -> None:
        self._impatient = client
        self._client = _patient(client, retry_seconds)
        self._retry_seconds = retry_seconds
        self.run_id = run_id
        self._resumed = resumed
        self._last_steps: dict[str, int] = {}

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        """Metrics of one step; what a resumed run had logged before is not logged twice."""
        now = int(time.time() * 1000)
        entities = [
            Metric(name, float(value), now, step)
            for name, value in metrics.items()
            if not self._resumed or step > self._last_step(name)
        ]
        self._client.log_batch(self.run_id, metrics=entities)

    def history(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a metric so far."""
        metrics = self._client.get_metric_history(self.run_id, name)
        return sorted((metric.step, metric.value) for metric in metrics)

    def child(self, name: str, tags: dict[str, str], file: Path | None = None) -> Tracker:
        """Starts a run that is a part of this one.

        With a file, its id is kept there; where the file is there already, from before an
        interruption, that run goes on instead.
        """
        run_id = file.read_text("utf-8") if file is not None and file.is_file() else None
        if run_id is not None and _exists(self._client, run_id):
            return _reopened(self._impatient, run_id, self._retry_seconds)
        experiment_id = self._client.get_run(self.run_id).info.experiment_id
        parent = {MLFLOW_PARENT_RUN_ID: self.run_id, _PART_OF: self.run_id}
        run = self._client.create_run(experiment_id, run_name=name, tags=parent)
        child = Tracker(self._impatient, run.info.run_id, False, self._retry_seconds)
        child.set_tags(tags)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(child.run_id, encoding="utf-8")
        return child

    def _last_step(self, name: str) -> int:
        if name not in self._last_steps:
            self._last_steps[name] = max((step for step, _ in self.history(name)), default=-1)
        return self._last_steps[name]

    def log_params(self, params: dict[str, Any]) -> None:
        """Settings by name; a resumed run keeps those that it started with."""
        known = self._client.get_run(self.run_id).data.params if self._resumed else {}
        entities = [
            Param(name, redact(_param(value))[:_MAX_PARAM_LENGTH])
            for name, value in params.items()
            if name not in known
        ]
        for start in range(0, len(entities), 100):
            self._client.log_batch(self.run_id, params=entities[start : start + 100])

    def set_tags(self, tags: dict[str, str]) -> None:
        """Tags by name."""
        entities = [RunTag(name, redact(value)[:_MAX_TAG_LENGTH]) for name, value in tags.items()]
        self._client.log_batch(self.run_id, tags=entities)

    def tags(self) -> dict[str, str]:
        """Tags of the run by name."""
        return dict(self._client.get_run(self.run_id).data.tags)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """What was trained on or scored with."""
        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=redact(source))
        given = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        try:
            self._client.log_inputs(self.run_id, given)
        except MlflowException:
            # MLflow looks for the dataset and then adds it; another process may have been between.
            self._client.log_inputs(self.run_id, given)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or a folder with all in it."""
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder or path.name)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """A text as an artifact."""
        self._client.log_text(self.run_id, redact(text), name)

    def log_table(self, columns: dict[str, list[str]], name: str) -> None:
        """Texts by column, as a table that MLflow shows."""
        redacted = {column: [redact(text) for text in texts] for column, texts in columns.items()}
        self._client.log_table(self.run_id, redacted, name)

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure as an artifact."""
        self._client.log_figure(self.run_id, figure, name)

    def finish(self, status: str) -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)

    def fail(self, error: BaseException) -> None:
        """Ends the run as FAILED, or KILLED by a signal; a lost store must not hide the error."""
        status = status_of(error)
        reason = redact(f"{type(error).__name__}: {error}")
        self._client = self._impatient  # it may be this that failed
        for record in (lambda: self.set_tags({"error": reason}), lambda: self.finish(status)):
            try:
                record()
            except Exception as also:
                _log.warning("the failure could not be recorded: %s", redact(str(also))[:300])


class SilentTracker(Tracker):
    """Of a process that follows another one, which records the run."""

    def __init__(self) -> None:
        self.run_id = ""

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        pass

    def child(self, name: str, tags: dict[str, str], file: Path | None = None) -> Tracker:
        return self

    def log_params(self, params: dict[str, Any]) -> None:
        pass

    def set_tags(self, tags: dict[str, str]) -> None:
        pass

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        pass

    def finish(self, status: str) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass


def status_of(error: BaseException) -> str:
    """KILLED where a signal or a scheduler ended the run, else FAILED."""
    return "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"


def start_tracking(
    uri: str,
    experiment: str,
    outputs: Path,
    run_name: str,
    run_id: str | None = None,
    parent_id: str | None = None,
    tags: dict[str, str] | None = None,
    never_ended: dict[str, str] | None = None,
    retry_seconds: float = 0,
    is_known: bool = False,
) -> Tracker:
    """Opens the store and starts a run, or goes on with the run of the given id.

    With `parent_id` the new run stands below that one, if the store has it. It has its tags from
    its first moment on, so that it can be found however early its process is killed.

    Args:
        uri: The store.
        experiment: Name of the experiment, which is made where there is none.
        outputs: Folder for its lock and, without a server, its artifacts.
        run_name: Of a new run.
        run_id: Of the run to go on with.
        parent_id: Of the run above.
        tags: Of the run.
        never_ended: Tags that only a killed process can have left at a run that is not ended; such
            a run goes on.
        retry_seconds: How long a store that stops answering is asked again. One that does not
            answer now is refused at once, for its address may be wrong.
        is_known: Whether the store has answered before; then it is asked again now too.

    Raises:
        ExperimentError: The store cannot be reached.
    """
    outputs.mkdir(parents=True, exist_ok=True)

    experiment, run_name = redact(experiment), redact(run_name)

    def start() -> Tracker:
        # Two processes that create the same database at once would break each other.
        with FileLock(outputs / "mlflow.lock"):
            _ask_database(uri)
            _create_whole(uri)
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment)
            if found is not None:
                experiment_id = found.experiment_id
            else:
                # Without a server artifacts would go to the working directory.
                served = uri.startswith(("http:", "https:"))
                experiment_id = client.create_experiment(
                    experiment,
                    artifact_location=None if served else (outputs / "artifacts").as_uri(),
                )
        known = run_id
        if known is None and never_ended is not None:
            known = _never_ended(client, experiment_id, never_ended)
        if known is not None and _exists(client, known):
            end_interrupted(uri, known)
            tracker = _reopened(client, known, retry_seconds)
            tracker.set_tags(tags or {})
            return tracker
        own = {name: redact(value)[:_MAX_TAG_LENGTH] for name, value in (tags or {}).items()}
        if parent_id is not None and _exists(client, parent_id):
            own[MLFLOW_PARENT_RUN_ID] = parent_id
            experiment_id = client.get_run(parent_id).info.experiment_id
        new = client.create_run(experiment_id, run_name=run_name, tags=own)
        return Tracker(client, new.info.run_id, False, retry_seconds)

    try:
        return patiently(start, retry_seconds) if is_known else start()
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise ExperimentError(
            redact(
                f"tracking.uri={uri} cannot be used: {reason_of(error)}; check it, or use"
                " tracking=local"
            )
        ) from error


def _param(value: Any) -> str:
    """Short enough for the axis of a figure: lists without brackets and quotes."""
    return ",".join(map(str, value)) if isinstance(value, list) and value else str(value)


def open_tracker(uri: str | None, run_id: str | None) -> Tracker:
    """Writes to a run that has ended.

    Raises:
        ExperimentError: The store cannot be reached, or lacks the run.
    """
    if uri is None or run_id is None:
        raise ExperimentError("the MLflow run is not known")
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise ExperimentError(f"there is no {file}, where MLflow has run {run_id}")
    try:
        client = MlflowClient(tracking_uri=uri)
        client.get_run(run_id)
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise ExperimentError(redact(f"no run {run_id} in {uri}: {reason_of(error)}")) from error
    return Tracker(client, run_id, resumed=True)


def tag_run(uri: str, run_id: str, tags: dict[str, str]) -> None:
    """Sets tags of a run that has ended; of one that the store has lost nothing."""
    client = MlflowClient(tracking_uri=uri)
    if _exists(client, run_id):
        for name, value in tags.items():
            client.set_tag(run_id, name, redact(value)[:_MAX_TAG_LENGTH])


def finish_killed(uri: str, run_id: str, result: Path) -> None:
    """Ends a run whose process was killed after it had written its result, and before this."""
    client = MlflowClient(tracking_uri=uri)
    try:
        if _exists(client, run_id) and client.get_run(run_id).info.status == "RUNNING":
            client.log_artifact(run_id, str(result))
            client.set_terminated(run_id, "FINISHED")
    except (MlflowException, SQLAlchemyError, OSError) as error:
        _log.warning("MLflow's run %s could not be looked at: %s", run_id, reason_of(error))


def _reopened(client: MlflowClient, run_id: str, retry_seconds: float) -> Tracker:
    patient = _patient(client, retry_seconds)
    patient.update_run(run_id, status="RUNNING")
    if "error" in patient.get_run(run_id).data.tags:
        patient.delete_tag(run_id, "error")
    return Tracker(client, run_id, True, retry_seconds)


def patiently(call: Callable[[], T], seconds: float) -> T:
    """What a call to the store gives, which is repeated for some time while that does not answer.

    A call that did arrive although its answer was lost does no harm twice: metrics carry their time
    and step, tags and params their name; at worst a run is there that never began.

    Raises:
        ExperimentError: It has not answered for so long.
    """
    start, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            return call()
        except (MlflowException, SQLAlchemyError, OSError) as error:
            if seconds <= 0 or not is_passing(error):
                raise
            left = start + seconds - time.monotonic()
            if left <= 0:
                raise ExperimentError(
                    redact(
                        f"MLflow's store has not answered for {seconds:g} s"
                        f" (tracking.retry_seconds): {reason_of(error)}; when it is back,"
                        " resume=true goes on from the last checkpoint"
                    )
                ) from error
            if pause == _FIRST_PAUSE:
                _log.warning(
                    "MLflow's store does not answer, asking again for %g s: %s",
                    seconds,
                    redact(reason_of(error)),
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)


def is_passing(error: Exception) -> bool:
    """Whether a store that answers so may be back later."""
    if any(words in str(error) for words in _LASTING):
        return False
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING or _UNREACHABLE in str(error)
    return isinstance(error, (OperationalError, ConnectionError))


def _patient(client: MlflowClient, seconds: float) -> MlflowClient:
    return cast(MlflowClient, _PatientClient(client, seconds)) if seconds > 0 else client


class _PatientClient:
    """MLflow's client, each call of which is made `patiently`."""

    def __init__(self, client: MlflowClient, seconds: float) -> None:
        self._client, self._seconds = client, seconds

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._client, name)

        def call(*given: Any, **named: Any) -> Any:
            return patiently(lambda: function(*given, **named), self._seconds)

        return call


def sqlite_file(uri: str) -> Path | None:
    """The file of a store that is a database in a file."""
    try:
        address = make_url(uri)
    except ArgumentError:
        return None
    is_file = address.get_backend_name() == "sqlite" and address.database
    return Path(str(address.database)) if is_file else None


def _ask_database(uri: str) -> None:
    """Fails at once where a database does not answer; MLflow would try for minutes."""
    try:
        address = make_url(uri)
    except ArgumentError:
        return
    if address.get_backend_name() == "postgresql":
        engine = create_engine(address, poolclass=NullPool, connect_args={"connect_timeout": 10})
        engine.connect().close()


def _create_whole(uri: str) -> None:
    """Makes the database of a store in a file; MLflow cannot go on with one that it began."""
    file = sqlite_file(uri)
    if file is None or file.exists():
        return
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
    partial.replace(file)


def _exists(client: MlflowClient, run_id: str) -> bool:
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if is_passing(error):
            raise
        return False


def end_interrupted(uri: str, run_id: str) -> None:
    """Marks a run and its parts as KILLED that a killed process left as running."""
    client = MlflowClient(tracking_uri=uri)
    if not _exists(client, run_id):
        return
    run = client.get_run(run_id)
    for left in [run, *_children(client, run)]:
        if left.info.status == "RUNNING":
            client.set_terminated(left.info.run_id, "KILLED")


def _never_ended(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> str | None:
    """The run of an experiment that has these tags and is running, if there is one."""
    wanted = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    query = " and ".join([*wanted, "attributes.status = 'RUNNING'"])
    runs = client.search_runs([experiment_id], query, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def end_tagged(uri: str, experiment: str, tag: str, value: str) -> None:
    """Marks the running runs of an experiment that have this tag as KILLED, and their parts."""
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(redact(experiment))
    if found is not None:
        for run in client.search_runs([found.experiment_id], f"tags.`{tag}` = '{value}'"):
            end_interrupted(uri, run.info.run_id)


def _children(client: MlflowClient, run: Run) -> list[Run]:
    """The run's own parts; what else stands below it may belong to another process."""
    below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.info.run_id}'"
    return [
        child
        for child in client.search_runs([run.info.experiment_id], below)
        if _PART_OF in child.data.tags
    ]
