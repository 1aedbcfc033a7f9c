"""Sweeps under Hydra's Optuna sweeper: their cells, studies, record and MLflow run.

The sweeper asks Optuna for trials and launches a job for each. What it lacks stands here: what a
sweep has finished before is not run again, what a killed process left is taken up, two processes
share the cells, and trial and MLflow run name each other.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from minilm_exp import resolvers
from minilm_exp.errors import ExperimentError
from minilm_exp.estimate import estimate_seconds
from minilm_exp.parsing import parse
from minilm_exp.provenance import fingerprint_text
from minilm_exp.redaction import redact
from minilm_exp.result import Result, write_json
from minilm_exp.studies import SharedStorage
from minilm_exp.sweep_record import Cell, open_record
from minilm_exp.sweep_summary import print_cells, print_end
from minilm_exp.tracking import end_tagged, start_tracking
from minilm_exp.trial import Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)
_SESSION = "sweep.json"
_TRIALS = "trials.jsonl"
_ALIVE = "alive.lock"
# What differs between two calls of one sweep.
_NOT_OF_THE_SWEEP = {"hydra", "runtime", "tracking", "outputs_dir", "data_root", "seed"}
_NOT_OF_THE_SWEEP |= {"resume", "rerun", "profile", "num_trials"}


@dataclass(frozen=True)
class Session:
    """One call of a sweep, as its jobs find it in the sweep's Hydra folder.

    Attributes:
        folder: That folder.
        outputs: The folder of all runs.
        sweep: Name of the file in sweeps/.
        name: Of the record.
        study: Of the Optuna study: a grid or space of one record.
        storage: Of Optuna.
        parent_id: The MLflow run of the sweep.
        uri: Of MLflow.
        experiment: Of MLflow.
        sizes: How many values each setting of a grid has; empty for a search.
        seed: Of the runs, where it is not varied.
    """

    folder: str
    outputs: str
    sweep: str
    name: str
    study: str
    storage: str
    parent_id: str
    uri: str
    experiment: str
    sizes: dict[str, int]
    seed: str

    @staticmethod
    def read(folder: Path) -> Session | None:
        """The session whose jobs have this folder; None where it is no sweep of sweeps/."""
        file = folder / _SESSION
        return Session(**json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def trial(self, job: int) -> Trial:
        """What a job's run needs to know of its trial."""
        number, _ = self._asked(job)

        def started(run_id: str) -> None:
            self._note(number, mlflow_run_id=run_id)

        return Trial(self.parent_id, _tag(self.name, self.study, number), started)

    def finished(self, job: int, result: Result) -> None:
        """Puts the run of a job into the record."""
        _, values = self._asked(job)
        with open_record(Path(self.outputs), self.sweep, self.name) as record:
            cell = record.cell(values)
            cell.folder, cell.run_key, cell.error = result.folder, result.run_key, None

    def failed(self, job: int, reason: str) -> None:
        """Puts the reason into the record, the trial, and MLflow, where no run began."""
        number, values = self._asked(job)
        if "mlflow_run_id" not in self._note(number, error=reason):
            outputs, name = Path(self.outputs), Cell(values).name
            tags = _tag(self.name, self.study, number) | {"error": reason}
            tracker = start_tracking(
                self.uri, self.experiment, outputs, name, parent_id=self.parent_id, tags=tags
            )
            tracker.log_params(values)
            tracker.finish("FAILED")
            self._note(number, mlflow_run_id=tracker.run_id)
        with open_record(Path(self.outputs), self.sweep, self.name) as record:
            record.cell(values).error = reason

    def _asked(self, job: int) -> tuple[int, dict[str, str]]:
        lines = (Path(self.folder) / _TRIALS).read_text("utf-8").splitlines()
        trial = json.loads(lines[job])
        return trial["number"], {"seed": self.seed} | trial["values"]

    def _note(self, number: int, **attributes: str) -> dict[str, Any]:
        """Sets attributes of a trial, and gives all that it has."""
        storage = SharedStorage(self.storage)
        study_id = storage.get_study_id_from_name(self.study)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        for name, value in attributes.items():
            storage.set_trial_user_attr(trial_id, name, redact(value)[:2000])
        return storage.get_trial(trial_id).user_attrs


def note_trial(config: DictConfig, trial: optuna.Trial) -> None:
    """Keeps a trial's number for its job; the sweeper calls it once it has asked for the trial."""
    folder = Path(config.hydra.sweep.dir)
    trial.set_user_attr("session", str(folder))
    trial.set_user_attr("host", platform.node())
    values = {name: str(value) for name, value in trial.params.items()}
    with (folder / _TRIALS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"number": trial.number, "values": values}) + "\n")


class SweepCallback(Callback):
    """Before a sweep and after it."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._alive: FileLock | None = None

    def __reduce__(self) -> tuple[type[SweepCallback], tuple[()]]:
        """Launchers hand it on to the processes of the jobs, where it has nothing to do."""
        return SweepCallback, ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prepares study and record, prints the cells, and has the sweeper run what is left.

        Raises:
            SystemExit: The sweep cannot begin; Hydra turns other exceptions into warnings.
        """
        try:
            folder = Path(config.hydra.sweep.dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._alive = FileLock(folder / _ALIVE)
            self._alive.acquire(timeout=0)
            self._session = _start(config)
        except Exception as error:
            is_known = isinstance(error, ExperimentError)
            reason = str(error) if is_known else f"unexpected {type(error).__name__}: {error}"
            raise SystemExit(f"error: {redact(reason)}") from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the MLflow run of the sweep and says what stands and what failed."""
        if self._session is not None:
            _end(self._session)
        if self._alive is not None:
            self._alive.release()


def _start(config: DictConfig) -> Session:
    hydra = config.hydra
    outputs = Path(os.path.abspath(os.path.expanduser(str(config.outputs_dir))))
    outputs.mkdir(parents=True, exist_ok=True)
    sweep = str(hydra.runtime.choices.sweeps)
    space, settings = _space(hydra)
    is_grid = hydra.runtime.choices["hydra/sweeper/sampler"] == "grid"
    name = f"{sweep}-{_fingerprint(config, space)}"
    study_name = f"{name}-{fingerprint_text(repr(sorted(space.items(), key=str)))[:8]}"
    storage = str(config.tracking.studies)
    study = optuna.create_study(
        study_name=study_name,
        storage=SharedStorage(storage),
        directions=_directions(hydra.sweeper.direction),
        load_if_exists=True,
    )
    uri, experiment = str(config.tracking.uri), str(config.tracking.experiment)
    for number in _end_dead_trials(study):
        for tag, value in _tag(name, study_name, number).items():
            end_tagged(uri, experiment, tag, value)
    grid = _grid(space) if is_grid else {}
    cells = _cells(grid) if is_grid else []
    with open_record(outputs, sweep, name) as record:
        record.command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        record.settings = [f"{key}={value}" for key, value in settings.items()]
        seed = {"seed": str(config.seed)}
        known = [record.cell(seed | {k: str(v) for k, v in cell.items()}) for cell in cells]
        tracker = start_tracking(uri, experiment, outputs, name, record.run_id)
        record.uri, record.run_id = redact(uri), tracker.run_id
        number = _enqueue(study, grid, known)
        tracker.set_tags(
            {"sweep": sweep, "study": study_name, "command": shlex.join(record.command)}
        )
    if is_grid:
        seconds = [_seconds(config, cell) for cell in cells]
        print_cells(name, known, seconds)
    else:
        done = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
        number = max(0, int(config.num_trials) - done)
        print(f"{name}: {done} of {config.num_trials} trials are finished", flush=True)
    resolvers.sweep_state.study = study_name
    resolvers.sweep_state.trials_left = number
    resolvers.sweep_state.trials_asked = len(study.trials)
    sizes = {name: len(values) for name, values in grid.items()}
    session = Session(
        str(hydra.sweep.dir), str(outputs), sweep, name, study_name, storage, tracker.run_id, uri,
        experiment, sizes, str(config.seed),
    )  # fmt: skip
    write_json(Path(hydra.sweep.dir) / _SESSION, asdict(session))
    return session


def _end(session: Session) -> None:
    with open_record(Path(session.outputs), session.sweep, session.name) as record:
        pass
    study = optuna.load_study(study_name=session.study, storage=SharedStorage(session.storage))
    tracker = start_tracking(
        session.uri, session.experiment, Path(session.outputs), session.name, session.parent_id
    )
    is_open = bool(_alive_trials(study))
    failed = [cell for cell in record.cells if cell.error is not None]
    resolvers.sweep_state.failed = tuple(cell.name for cell in failed)
    if not is_open:
        tracker.finish("FAILED" if failed else "FINISHED")
    print_end(record, is_open)


def _space(hydra: DictConfig) -> tuple[dict[str, BaseDistribution], dict[str, Any]]:
    """What is varied, as the sweeper will read it, and what the command line fixes."""
    given = [f"{name}={values}" for name, values in (hydra.sweeper.params or {}).items()]
    given += list(hydra.overrides.task)
    space, fixed, _ = create_params_from_overrides(given)
    return {name: d for name, d in space.items() if name not in fixed}, fixed


def _grid(space: dict[str, BaseDistribution]) -> dict[str, list[Any]]:
    """The values of each setting; the seed first."""
    grid = {}
    for name in sorted(space, key=lambda name: name != "seed"):
        try:
            grid[name] = list(OptunaSweeperImpl._to_grid_sampler_choices(space[name]))
        except ValueError as error:
            raise ExperimentError(
                f"{name}: a grid needs a list, such as {name}=choice(1,2); a range of numbers is"
                " for sweeps=search"
            ) from error
    return grid


def _cells(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """All combinations, one seed after the other, so that the first is soon complete."""
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _fingerprint(config: DictConfig, space: dict[str, BaseDistribution]) -> str:
    """Of every setting that is not varied, and of the names of those that are."""
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    rest = {name: value for name, value in content.items() if name not in _NOT_OF_THE_SWEEP}
    varied = sorted(set(space) - {"seed"})
    return fingerprint_text(json.dumps([rest, varied], sort_keys=True, default=str))[:8]


def _directions(given: Any) -> list[StudyDirection]:
    several = given if OmegaConf.is_list(given) else [given]
    return [StudyDirection[str(getattr(one, "name", one)).upper()] for one in several]


def _enqueue(study: optuna.Study, grid: dict[str, list[Any]], known: list[Cell]) -> int:
    """Puts the cells that are neither finished nor being run into the study's queue.

    Returns:
        How many trials are to be asked for, those that were in the queue before with them.
    """
    trials = study.get_trials(deepcopy=False)
    complete = [t.params for t in trials if t.state == TrialState.COMPLETE]
    running = [t.params for t in _alive_trials(study)]
    waiting = [t.system_attrs.get("fixed_params") for t in trials if t.state == TrialState.WAITING]
    number = len(waiting)
    # Its bookkeeping fails for trials of a queue that have no place in the grid.
    sampler = optuna.samplers.GridSampler(grid)
    places = [dict(zip(sampler._param_names, values)) for values in sampler._all_grids]
    for values, cell in zip(_cells(grid), known):
        if values in running or values in waiting or (values in complete and cell.is_finished):
            continue
        attributes = {
            "fixed_params": values,
            "grid_id": places.index(values),
            "search_space": sampler._search_space,
        }
        study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attributes))
        number += 1
    return number


def _alive_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    return [trial for trial in running if _is_alive(trial)]


def _tag(name: str, study: str, number: int) -> dict[str, str]:
    """By which the MLflow run of a trial names it."""
    return {f"sweep.{name}": f"{study} {number}"}


def _end_dead_trials(study: optuna.Study) -> list[int]:
    """Marks trials of processes that were killed as FAILED, and gives their numbers."""
    dead = []
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if not _is_alive(trial):
            storage: BaseStorage = study._storage
            storage.set_trial_user_attr(trial._trial_id, "error", "its process was killed")
            study.tell(trial.number, state=TrialState.FAIL)
            dead.append(trial.number)
    return dead


def _is_alive(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a running trial's process lives; on another machine that is taken for granted."""
    session, host = trial.user_attrs.get("session"), trial.user_attrs.get("host")
    if session is None:  # between the sweeper's question and `note_trial`, or killed there
        started = trial.datetime_start
        return started is not None and datetime.now() - started < timedelta(minutes=1)
    if host != platform.node():
        return True
    lock = FileLock(Path(session) / _ALIVE)
    if not Path(lock.lock_file).exists():
        return False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _seconds(config: DictConfig, cell: dict[str, Any]) -> float | None:
    """A rough estimate; None for a cell whose settings do not fit together."""
    loader = GlobalHydra.instance().config_loader()
    overrides = [o for o in config.hydra.overrides.task if o.split("=")[0] not in cell]
    overrides += [f"{name}={value}" for name, value in cell.items()]
    typed = {override.split("=")[0].lstrip("+~") for override in overrides}
    try:
        composed = loader.load_sweep_config(config, overrides)
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
        return estimate_seconds(parse(composed, True, typed))
    except ExperimentError:
        return None
