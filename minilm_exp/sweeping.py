"""Sweeps under Hydra's Optuna sweeper: their cells, studies, record and MLflow run.

The sweeper asks Optuna for trials and launches a job for each. What it lacks stands here: what a
sweep has finished before is not run again, what a killed process left is taken up, two processes
share the cells, and trial and MLflow run name each other.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from minilm_exp import resolvers
from minilm_exp.errors import ExperimentError
from minilm_exp.estimate import estimate_seconds
from minilm_exp.locks import AdvisoryLock, is_postgres
from minilm_exp.provenance import fingerprint_text, git_state
from minilm_exp.redaction import redact
from minilm_exp.result import Result, write_json
from minilm_exp.settings import NEUTRAL, TRIAL_VALUES, Tracking
from minilm_exp.sizing import settings_of
from minilm_exp.studies import SharedStorage
from minilm_exp.sweep_record import Cell, Runs, SweepRecord, open_record
from minilm_exp.sweep_summary import Plan, print_cells, print_end, print_search
from minilm_exp.table_spec import spec_of
from minilm_exp.tracking import end_interrupted, end_tagged, start_tracking
from minilm_exp.trial import Trial

# It warns of each trial of a process that finds the queue empty.
optuna.logging.set_verbosity(optuna.logging.ERROR)
# It tells the "best parameters", which of a grid are those of the luckiest seed.
logging.getLogger("hydra_plugins.hydra_optuna_sweeper._impl").setLevel(logging.WARNING)
_SESSION = "sweep.json"
_TRIALS = "trials.jsonl"
_ALIVE = "alive.lock"
# What differs between two calls of one sweep.
_NOT_OF_THE_SWEEP = {"hydra", "seed", *NEUTRAL} - {"trial_values"}


@dataclass(frozen=True)
class Session:
    """One call of a sweep, as its jobs find it in the sweep's Hydra folder.

    Attributes:
        folder: That folder.
        outputs: The folder of all runs.
        sweep: Name of the file in sweeps/.
        name: Of the record.
        study: Of the Optuna study: a grid or space of one record.
        parent_id: The MLflow run of the sweep.
        sizes: How many values each setting of a grid has; empty for a search.
        seed: Of the runs, where it is not varied.
        cells: Values of the cells of a grid.
    """

    folder: str
    outputs: str
    sweep: str
    name: str
    study: str
    parent_id: str
    sizes: dict[str, int]
    seed: str
    cells: list[dict[str, str]]

    @staticmethod
    def read(folder: Path) -> Session | None:
        """The session whose jobs have this folder; None where it is no sweep of sweeps/."""
        file = folder / _SESSION
        return Session(**json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def trial(self, job: int, tracking: Tracking) -> Trial:
        """What a job's run needs to know of its trial."""
        number, _ = self._asked(job)

        def started(run_id: str) -> None:
            self._note(number, tracking, mlflow_run_id=run_id)

        return Trial(self.parent_id, _tag(self.name, self.study, number), started)

    def finished(self, job: int, result: Result) -> None:
        """Puts the run of a job into the record."""
        _, values = self._asked(job)
        with open_record(Path(self.outputs), self.sweep, self.name) as record:
            record.cell(values).take(result)

    def failed(self, job: int, reason: str, tracking: Tracking) -> None:
        """Puts the reason into the record, the trial, and MLflow, where no run began."""
        number, values = self._asked(job)
        if "mlflow_run_id" not in self._note(number, tracking, error=reason):
            outputs, name = Path(self.outputs), Cell(values).name
            tags = _tag(self.name, self.study, number) | {"error": reason}
            tracker = start_tracking(
                tracking.uri, tracking.experiment, outputs, name, None, self.parent_id, tags,
                retry_seconds=tracking.retry_seconds, is_known=True,
            )  # fmt: skip
            tracker.log_params(values)
            tracker.finish("FAILED")
            self._note(number, tracking, mlflow_run_id=tracker.run_id)
        with open_record(Path(self.outputs), self.sweep, self.name) as record:
            record.cell(values).error = reason

    def end_left(self, job: int, tracking: Tracking) -> None:
        """Marks MLflow runs of a job that has ended, but for one of its processes, as KILLED."""
        number, _ = self._asked(job)
        for tag, value in _tag(self.name, self.study, number).items():
            end_tagged(tracking.uri, tracking.experiment, tag, value)

    def _asked(self, job: int) -> tuple[int, dict[str, str]]:
        lines = (Path(self.folder) / _TRIALS).read_text("utf-8").splitlines()
        trial = json.loads(lines[job])
        return trial["number"], {"seed": self.seed} | trial["values"]

    def _note(self, number: int, tracking: Tracking, **attributes: str) -> dict[str, Any]:
        """Sets attributes of a trial, and gives all that it has."""
        storage = SharedStorage(tracking.studies, tracking.retry_seconds)
        study_id = storage.get_study_id_from_name(self.study)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        for name, value in attributes.items():
            storage.set_trial_user_attr(trial_id, name, value[:2000])
        return storage.get_trial(trial_id).user_attrs


def note_trial(config: DictConfig, trial: optuna.Trial) -> None:
    """Keeps a trial's number for its job; the sweeper calls it once it has asked for the trial."""
    folder = _folder(config)
    trial.set_user_attr("session", str(folder))
    trial.set_user_attr("host", platform.node())
    is_grid = config.hydra.runtime.choices["hydra/sweeper/sampler"] == "grid"
    of_queue = trial.study._storage.get_trial_system_attrs(trial._trial_id)
    if is_grid and "fixed_params" not in of_queue:
        trial.set_user_attr("repeats", "another process had taken the last cell of the queue")
    values = {name: str(value) for name, value in trial.params.items()}
    with (folder / _TRIALS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"number": trial.number, "values": values}) + "\n")


class SweepCallback(Callback):
    """Before a sweep and after it."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._alive: FileLock | AdvisoryLock | None = None

    def __reduce__(self) -> tuple[type[SweepCallback], tuple[()]]:
        """Launchers hand it on to the processes of the jobs, where it has nothing to do."""
        return SweepCallback, ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prepares study and record, prints the cells, and has the sweeper run what is left.

        Raises:
            SystemExit: The sweep cannot begin; Hydra turns other exceptions into warnings.
        """
        try:
            folder = _folder(config)
            folder.mkdir(parents=True, exist_ok=True)
            # A database that does not answer now may be a slip in its address.
            self._alive = _life(str(folder), platform.node(), tracking_of(config), 0)
            self._alive.acquire(timeout=0)
            self._session = _start(config)
        except Exception as error:
            is_known = isinstance(error, (ExperimentError, HydraException, OmegaConfBaseException))
            reason = str(error) if is_known else f"unexpected {type(error).__name__}: {error}"
            raise SystemExit(f"error: {redact(reason)}") from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Waits for cells that other processes compute, and says what stands and what failed."""
        if self._alive is not None:
            # A trial that an interruption left is no longer alive.
            self._alive.release()
        if self._session is not None:
            is_interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
            tracking = tracking_of(config)
            try:
                _end(self._session, tracking, is_interrupted, bool(config.report))
            except ExperimentError:
                # Of a database of studies that is gone; MLflow may be another one.
                end_interrupted(tracking.uri, self._session.parent_id)
                raise


def _folder(config: DictConfig) -> Path:
    return Path(os.path.abspath(str(config.hydra.sweep.dir)))


def tracking_of(config: DictConfig) -> Tracking:
    """Its part of a config that was not parsed."""
    tracking = config.tracking
    return Tracking(
        str(tracking.uri),
        str(tracking.experiment),
        str(tracking.studies),
        float(tracking.retry_seconds),
    )


def _start(config: DictConfig) -> Session:
    hydra = config.hydra
    outputs = Path(os.path.abspath(os.path.expanduser(str(config.outputs_dir))))
    outputs.mkdir(parents=True, exist_ok=True)
    sweep, tracking = str(hydra.runtime.choices.sweeps), tracking_of(config)
    space = _space(hydra)
    is_grid = hydra.runtime.choices["hydra/sweeper/sampler"] == "grid"
    directions = _directions(hydra.sweeper.direction)
    wrong = not OmegaConf.is_list(config.trial_values) or not config.trial_values
    if wrong or not set(config.trial_values) <= set(TRIAL_VALUES):
        raise ExperimentError(
            f"trial_values={config.trial_values} is no list of {', '.join(TRIAL_VALUES)}"
        )
    if len(directions) != len(config.trial_values):
        raise ExperimentError(
            f"trial_values={list(config.trial_values)} needs a direction each:"
            f" hydra.sweeper.direction={[d.name.lower() for d in directions]} has {len(directions)}"
        )
    grid = _grid(space) if is_grid else {}
    cells = _cells(grid) if is_grid else []
    plans = [_plan(config, cell, is_grid) for cell in cells or [{}]]
    if not is_grid:
        if not isinstance(config.num_trials, int) or config.num_trials < 1:
            raise ExperimentError(
                f"num_trials={config.num_trials}: a search needs a whole number, at least 1"
            )
        for choice in _single_choices(space):
            _plan(config, choice, False)
    runs = Runs(outputs)
    seed = {"seed": str(config.seed)}
    name = f"{sweep}-{_fingerprint(config, space)}"
    with open_record(outputs, sweep, name) as record:
        # One queue for each grid: another seed or data_root is another, of the same record.
        of_study = [sorted(space.items(), key=str), seed, config.data_root, directions]
        study_name = f"{name}-{fingerprint_text(repr([record.token, of_study]))[:8]}"
        study = optuna.create_study(
            study_name=study_name,
            storage=SharedStorage(tracking.studies, tracking.retry_seconds),
            directions=directions,
            load_if_exists=True,
        )
        for trial in _end_dead_trials(study, tracking):
            for tag, value in _tag(name, study_name, trial.number).items():
                end_tagged(tracking.uri, tracking.experiment, tag, value)
            if not is_grid:
                study.enqueue_trial(trial.params)
        record.begin([redact(word) for word in (Path(sys.argv[0]).name, *sys.argv[1:])], is_grid)
        record.trial_values = [str(value) for value in config.trial_values]
        record.directions = [direction.name.lower() for direction in directions]
        if not is_grid:
            record.num_trials, record.num_complete = int(config.num_trials), _num_complete(study)
        known = record.order([seed | {k: str(v) for k, v in cell.items()} for cell in cells], runs)
        for cell, plan in zip(known, plans):
            if plan.finished is not None:
                cell.take(plan.finished)
        tracker = start_tracking(
            tracking.uri, tracking.experiment, outputs, name, record.run_id, None,
            {"sweep": sweep, "study": study_name, "command": shlex.join(record.commands[-1])},
            retry_seconds=tracking.retry_seconds,
        )  # fmt: skip
        record.uri, record.run_id = redact(tracking.uri), tracker.run_id
        resolvers.sweep_state.calls = record.calls
    if not spec_of(sweep).is_file():
        print(f"there is no sweeps/{sweep}.table, which make table will need")
    if is_grid:
        print_cells(record, known, plans, runs)
        finished = [plan.finished is not None for plan in plans]
        while True:
            with open_record(outputs, sweep, name):
                number = _enqueue(study, grid, finished, tracking)
            if number or _num_complete(study):
                break
            # The sweeper asks for the best trial at its end, and there is none yet.
            _wait_for_others(study, tracking)
    else:
        number = max(0, int(config.num_trials) - _num_complete(study))
        number += _ask_again(study, record, seed, runs, bool(config.rerun))
        print_search(name, _num_complete(study), number, plans[0])
    if git_state()["dirty"] == "true":
        print("the tree has uncommitted changes: make table refuses cells that are made now\n")
    resolvers.sweep_state.study = study_name
    resolvers.sweep_state.trials_left = number
    session = Session(
        str(_folder(config)), str(outputs), sweep, name, study_name, tracker.run_id,
        {axis: len(values) for axis, values in grid.items()}, str(config.seed),
        [cell.values for cell in known],
    )  # fmt: skip
    write_json(_folder(config) / _SESSION, asdict(session))
    return session


def _end(session: Session, tracking: Tracking, is_interrupted: bool, has_report: bool) -> None:
    study = optuna.load_study(
        study_name=session.study, storage=SharedStorage(tracking.studies, tracking.retry_seconds)
    )
    if not is_interrupted:
        _wait_for_others(study, tracking)
    is_open = bool(_alive_trials(study, tracking))
    with open_record(Path(session.outputs), session.sweep, session.name) as record:
        record.num_complete = _num_complete(study) if not record.is_grid else 0
    runs = Runs(Path(session.outputs))
    asked = session.cells or [
        {"seed": session.seed} | {name: str(value) for name, value in trial.params.items()}
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get("session") == session.folder
    ]
    called = [cell for cell in record.cells if cell.values in asked]
    failed = [cell for cell in called if not runs.standing(cell)]
    resolvers.sweep_state.failed = tuple(cell.name for cell in failed)
    tracker = start_tracking(
        tracking.uri, tracking.experiment, Path(session.outputs), session.name, session.parent_id,
        retry_seconds=tracking.retry_seconds, is_known=True,
    )  # fmt: skip
    if not is_open:
        tracker.finish("KILLED" if is_interrupted else "FAILED" if failed else "FINISHED")
    print_end(record, failed, runs)
    if has_report and not is_interrupted:
        from minilm_exp.sweep_report import write_sweep_report  # heavy
        from minilm_exp.tables import Asked

        report = write_sweep_report(
            Asked(session.sweep, runs.folder.parent, record, runs, tracking.uri)
        )
        tracker.log_artifact(report)
        print(f"report      {report}")


def _single_choices(space: dict[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Each value of each list of a search by itself."""
    lists = {n: d.choices for n, d in space.items() if isinstance(d, CategoricalDistribution)}
    return [{name: value} for name, choices in lists.items() for value in choices]


def _plan(config: DictConfig, cell: dict[str, Any], is_cell: bool) -> Plan:
    """What is known of a cell.

    Raises:
        ExperimentError: It cannot be composed, as with a value that a group lacks: Hydra would end
            the whole sweep there. One whose settings are refused fails by itself.
    """
    from minilm_exp.pipeline import find_finished  # heavy, and the config was found right

    task = list(config.hydra.overrides.task)
    swept = OverridesParser.create().parse_overrides(task)
    fixed = [o for o, parsed in zip(task, swept) if not parsed.is_sweep_override()]
    overrides = [o for o in fixed if o.split("=")[0] not in cell]
    overrides += [f"{name}={value}" for name, value in cell.items()]
    typed = {override.split("=")[0].lstrip("+~") for override in overrides}
    try:
        composed = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        asked = " ".join(f"{name}={value}" for name, value in cell.items())
        raise ExperimentError(f"nothing was started, {asked} is no cell: {error}") from error
    try:
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
            OmegaConf.update(composed, "student.budget.remeasure", False)
        settings = settings_of(composed, True, typed)
        return Plan(estimate_seconds(settings), find_finished(settings) if is_cell else None)
    except (ExperimentError, OmegaConfBaseException) as error:
        return Plan(error=redact(str(error)))


def _space(hydra: DictConfig) -> dict[str, BaseDistribution]:
    """What is varied, as the sweeper will read it."""
    given = [f"{name}={values}" for name, values in (hydra.sweeper.params or {}).items()]
    given += list(hydra.overrides.task)
    space, fixed, _ = create_params_from_overrides(given)
    return {name: d for name, d in space.items() if name not in fixed}


def _grid(space: dict[str, BaseDistribution]) -> dict[str, list[Any]]:
    """The values of each setting; the seed first."""
    grid = {}
    for name in sorted(space, key=lambda name: name != "seed"):
        try:
            values = list(OptunaSweeperImpl._to_grid_sampler_choices(space[name]))
        except ValueError as error:
            raise ExperimentError(
                f"{name}: a grid needs a list, such as {name}=choice(1,2), or a range of whole"
                " numbers; an interval is for sweeps=search"
            ) from error
        twice = [value for number, value in enumerate(values) if value in values[:number]]
        if twice:
            raise ExperimentError(f"{name}={twice[0]} is there twice: give each value once")
        grid[name] = values
    return grid


def _cells(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """All combinations, one seed after the other, so that the first is soon complete."""
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _fingerprint(config: DictConfig, space: dict[str, BaseDistribution]) -> str:
    """Of every setting that is not varied, and of the names of those that are."""
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    rest = {name: value for name, value in content.items() if name not in _NOT_OF_THE_SWEEP}
    if rest["teacher"].get("trust_remote_code") is False:
        del rest["teacher"]["trust_remote_code"]  # as in records of before there was such a setting
    varied = sorted(set(space) - {"seed"})
    return fingerprint_text(json.dumps([rest, varied], sort_keys=True, default=str))[:8]


def _directions(given: Any) -> list[StudyDirection]:
    several = given if OmegaConf.is_list(given) else [given]
    names = [str(getattr(one, "name", one)).upper() for one in several]
    if not set(names) <= {"MAXIMIZE", "MINIMIZE"}:
        raise ExperimentError(f"hydra.sweeper.direction={given} is not maximize or minimize")
    return [StudyDirection[name] for name in names]


def _ask_again(
    study: optuna.Study, record: SweepRecord, seed: dict[str, str], runs: Runs, rerun: bool
) -> int:
    """Puts complete trials of a search whose run is gone into the queue; with rerun all of them.

    Returns:
        How many.
    """
    waiting = study.get_trials(deepcopy=False, states=[TrialState.WAITING])
    asked = [trial.system_attrs.get("fixed_params") for trial in waiting]
    number = 0
    for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        cell = record.cell(seed | {name: str(value) for name, value in trial.params.items()})
        if (rerun or not runs.standing(cell)) and trial.params not in asked:
            asked.append(trial.params)
            study.enqueue_trial(trial.params)
            number += 1
    return number


def _enqueue(
    study: optuna.Study, grid: dict[str, list[Any]], is_finished: list[bool], tracking: Tracking
) -> int:
    """Puts the cells that are neither finished nor being run into the study's queue.

    A finished one without a complete trial, as after a run by itself, gets its trial too.

    Returns:
        How many trials are to be asked for, those that were in the queue before with them.
    """
    trials = study.get_trials(deepcopy=False)
    complete = [t.params for t in trials if t.state == TrialState.COMPLETE]
    running = [t.params for t in _alive_trials(study, tracking)]
    waiting = [t.system_attrs.get("fixed_params") for t in trials if t.state == TrialState.WAITING]
    number = len(waiting)
    # Its bookkeeping fails for trials of a queue that have no place in the grid.
    sampler = optuna.samplers.GridSampler(grid)
    places = [dict(zip(sampler._param_names, values)) for values in sampler._all_grids]
    for values, finished in zip(_cells(grid), is_finished):
        if values in running or values in waiting or (values in complete and finished):
            continue
        attributes = {
            "fixed_params": values,
            "grid_id": places.index(values),
            "search_space": sampler._search_space,
        }
        study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attributes))
        number += 1
    return number


def _wait_for_others(study: optuna.Study, tracking: Tracking) -> None:
    if _alive_trials(study, tracking):
        print("waiting for the cells that another process computes", flush=True)
    while _alive_trials(study, tracking):
        time.sleep(2)


def _num_complete(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))


def _alive_trials(study: optuna.Study, tracking: Tracking) -> list[optuna.trial.FrozenTrial]:
    running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    return [trial for trial in running if _is_alive(trial, tracking)]


def _tag(name: str, study: str, number: int) -> dict[str, str]:
    """By which the MLflow run of a trial names it."""
    return {f"sweep.{name}": f"{study} {number}"}


def _end_dead_trials(study: optuna.Study, tracking: Tracking) -> list[optuna.trial.FrozenTrial]:
    """Marks trials of processes that were killed as FAILED, and gives them."""
    dead = []
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if not _is_alive(trial, tracking):
            storage: BaseStorage = study._storage
            storage.set_trial_user_attr(trial._trial_id, "error", "its process was killed")
            study.tell(trial.number, state=TrialState.FAIL)
            dead.append(trial)
    return dead


def _life(
    folder: str, host: str, tracking: Tracking, retry_seconds: float | None = None
) -> FileLock | AdvisoryLock:
    """The lock that a sweep's process holds while it lives."""
    if is_postgres(tracking.studies):
        seconds = tracking.retry_seconds if retry_seconds is None else retry_seconds
        return AdvisoryLock(tracking.studies, f"sweep {host} {folder}", seconds)
    return FileLock(Path(folder) / _ALIVE)


def _is_alive(trial: optuna.trial.FrozenTrial, tracking: Tracking) -> bool:
    """Whether a running trial's process lives.

    Its lock says so. Without Postgres that is a file, and the process of another machine whose
    folder cannot be seen is taken for alive.
    """
    session, host = trial.user_attrs.get("session"), trial.user_attrs.get("host")
    if session is None:  # between the sweeper's question and `note_trial`, or killed there
        started = trial.datetime_start
        # Or in the future, if the clock went back.
        return started is not None and abs(datetime.now() - started) < timedelta(minutes=1)
    lock = _life(session, str(host), tracking)
    if isinstance(lock, FileLock) and not Path(lock.lock_file).exists():
        return host != platform.node()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
