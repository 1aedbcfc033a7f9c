"""Distils a transformer encoder: python run.py teacher=bert_large student=l6h768 relations=kk_vv.

The one entrypoint. What a run does is in minilm_exp/pipeline.py; here is only what ties it to
Hydra and to the terminal.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from minilm_exp.class_paths import CALLBACK, SEARCH_SPACE, refuse_code
from minilm_exp.errors import ExperimentError, Interrupted
from minilm_exp.launching import Sweeper
from minilm_exp.redaction import redact, remember
from minilm_exp.resolvers import REPOSITORY, register_resolvers, sweep_state

if TYPE_CHECKING:
    from minilm_exp.settings import Settings
    from minilm_exp.sweeping import Session

_failed_jobs: list[str] = []
# Where Hydra may have kept the command line.
_sweep_folders: list[Path] = []
_finished_jobs: list[tuple[list[str], Any]] = []


def _options(group: str) -> str:
    """What --help writes below a group, of --config-dir too, for a terminal of 80 columns."""
    options = GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)
    return _listed(options)


def _listed(options: Iterable[str]) -> str:
    return textwrap.fill(", ".join(options), 80, initial_indent="    ", subsequent_indent="    ")


register_resolvers()
OmegaConf.register_resolver("options", _options, replace=True)
Plugins.instance().register(Sweeper)
_compose = ConfigLoaderImpl._load_configuration


def _compose_data(loader: ConfigLoaderImpl, *arguments: Any, **named: Any) -> DictConfig:
    """Composes a config, and refuses one that names code before Hydra uses any of it."""
    more = _recipe_of_kind(named["overrides"])
    if more:
        named["overrides"] = [*named["overrides"], *more]
        if named.get("parsed_overrides") is not None:
            parsed = OverridesParser.create().parse_overrides(more)
            named["parsed_overrides"] = [*named["parsed_overrides"], *parsed]
    config = _compose(loader, *arguments, **named)
    refuse_code(config)
    _remember_passwords(config)
    with suppress(OmegaConfBaseException):
        _sweep_folders.append(Path(config.hydra.sweep.dir))
    return config


def _recipe_of_kind(overrides: list[str]) -> list[str]:
    """What experiment=compress adds, by what the teacher is; nothing that is given by itself."""
    if not any("experiment=" in override and "compress" in override for override in overrides):
        return []  # most calls need not read them
    from minilm_exp.teacher_facts import kind_of

    given = {}
    with suppress(HydraException):  # which composing will tell
        for override in OverridesParser.create().parse_overrides(overrides):
            is_single = not override.is_sweep_override()
            given[override.key_or_group] = override.value() if is_single else None
    path, revision = given.get("teacher.path"), given.get("teacher.revision")
    if given.get("experiment") != "compress" or not isinstance(path, str) or "recipe" in given:
        return []
    kind = kind_of(path, revision if isinstance(revision, str) else None)
    if kind == "classifier" and given.get("teacher.head") == "new":
        return []
    return [one for one in OF_KIND[kind] if one.split("=")[0] not in given]


OF_KIND = {
    "encoder": (),
    "sentence_encoder": ("recipe=sentence_encoder",),
    "classifier": ("recipe=task_specific", "task=teacher_labels", "teacher.head=own"),
}


def _remember_passwords(config: DictConfig) -> None:
    for name in ("tracking.uri", "tracking.studies"):
        with suppress(OmegaConfBaseException):
            remember(OmegaConf.select(config, name))


# Hydra, of exactly this version, has no hook between composing and its first use: it configures
# logging from the config, then builds callbacks.
ConfigLoaderImpl._load_configuration = _compose_data  # type: ignore


@hydra.main(config_path="conf", config_name="config", execution_whitelist=(CALLBACK, SEARCH_SPACE))
def job(config: DictConfig) -> float | tuple[float | None, ...] | None:
    """One run; its score, or what else it is to return, is what a sweep goes by."""
    hydra_config = HydraConfig.get()
    # Again, as a launcher may have composed it in a process of its own.
    refuse_code(config)
    refuse_code(OmegaConf.create({"hydra": hydra_config}))
    _remember_passwords(config)
    _redact_output()
    if hydra_config.output_subdir is not None:
        for file in Path(hydra_config.runtime.output_dir, hydra_config.output_subdir).glob(
            "*.yaml"
        ):
            _redact_file(file)
    sweep = hydra_config.runtime.choices.get("sweeps")
    if hydra_config.mode != RunMode.MULTIRUN:
        if sweep is not None:
            raise ExperimentError(f"sweeps={sweep} is a study of many runs: add -m")
        return _run(config, hydra_config, None)
    _redact_file(Path(hydra_config.sweep.dir) / "multirun.yaml")
    session = None
    if sweep is not None:
        from minilm_exp.sweeping import Session

        session = Session.read(Path(hydra_config.sweep.dir))
    try:
        return _run(config, hydra_config, session)
    except Exception as error:
        reason = redact(_explain(error))
        name = f"job {hydra_config.job.num} ({hydra_config.job.override_dirname})"
        _failed_jobs.append(f"{name}: {reason}")
        print(f"error in {redact(_failed_jobs[-1])}", file=sys.stderr)
        if session is not None:
            from minilm_exp.settings import Tracking

            session.failed(hydra_config.job.num, reason, Tracking(**config.tracking))
        raise


def _run(
    config: DictConfig, hydra_config: Any, session: Session | None
) -> float | tuple[float | None, ...] | None:
    if _num_processes() > 1 and hydra_config.mode == RunMode.MULTIRUN:
        raise ExperimentError(
            "torchrun starts the processes of one run, and -m asks for many: leave out one of them"
            " (docs/scaling.md)"
        )
    chosen = hydra_config.runtime.choices
    typed = {override.split("=")[0].lstrip("+~") for override in hydra_config.overrides.task}
    teacher_was_chosen = chosen.get("teacher") != "minilm_l6" or "teacher" in typed
    if OmegaConf.select(config, "runtime.num_threads", default=0) is None:
        # Of submitit's launchers; joblib tells its processes by itself.
        config.runtime.num_threads = hydra_config.launcher.get("cpus_per_task")
    settings = _parse(config, teacher_was_chosen, typed)
    _quiet_libraries()
    from minilm_exp.pipeline import run_experiment
    from minilm_exp.result import Result
    from minilm_exp.summary import print_summary

    trial = None if session is None else session.trial(hydra_config.job.num, settings.tracking)
    groups = {
        group: option
        for group, option in chosen.items()
        if option is not None and not group.startswith("hydra/")
    }
    asked = {"overrides": [*hydra_config.overrides.task], "groups": groups}
    outcome = run_experiment(settings, *_grid(hydra_config, session), trial, asked)
    if isinstance(outcome, Result):
        print_summary(settings, outcome)
        if session is not None:
            session.finished(hydra_config.job.num, outcome)
        else:
            _finished_jobs.append((list(hydra_config.overrides.task), outcome))
        values = tuple(outcome.trial_value(name) for name in settings.trial_values)
        return values if len(values) > 1 else values[0]
    if outcome is None:
        return None
    print(
        f"corpus ready in {outcome.folder}: {outcome.num_documents} documents,"
        f" {len(outcome.train)} examples ({outcome.train.num_tokens} tokens) to train on,"
        f" {len(outcome.validation)} held out"
    )
    return None


def _quiet_libraries() -> None:
    """Heavy imports come after the config has been found right."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if _process() > 0:  # the first one speaks for all
        logging.disable(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


def _parse(config: DictConfig, teacher_was_chosen: bool, typed: set[str]) -> Settings:
    from minilm_exp.budget import has_budget

    if not has_budget(config):
        from minilm_exp.parsing import parse

        return parse(config, teacher_was_chosen, typed)
    _quiet_libraries()
    from minilm_exp.pushing import check_push
    from minilm_exp.sizing import print_candidates, settings_of

    if config.push_to is not None:
        check_push(str(config.push_to))  # before minutes go into measuring

    settings = settings_of(config, teacher_was_chosen, typed)
    print_candidates(settings)
    if settings.student.budget.search == "none":
        return settings
    from minilm_exp.quick_search import search

    return search(config, settings, teacher_was_chosen, typed)


def _grid(hydra_config: Any, session: Session | None) -> tuple[int, int]:
    """Of this multirun: runs of one seed that share teacher, layer and corpus, and seeds.

    A search counts its trials, if none of them changes those.
    """
    if hydra_config.mode != RunMode.MULTIRUN:
        return 1, 1
    sweeper = hydra_config.sweeper
    if session is not None and session.sizes:
        sizes = session.sizes
    elif "n_trials" in sweeper:
        searched = [str(name) for name in (sweeper.get("params") or {})]
        shares = not any(name.startswith(_CACHE_CHANGES) for name in searched)
        return (int(sweeper.n_trials) if shares else 1), 1
    else:
        sizes = _sizes(OmegaConf.load(Path(hydra_config.sweep.dir) / "multirun.yaml"))
    num_cells = num_seeds = 1
    for name, number in sizes.items():
        if name == "seed":
            num_seeds *= number
        elif not name.startswith(_CACHE_CHANGES):
            num_cells *= number
    return num_cells, num_seeds


def _sizes(record: Any) -> dict[str, int]:
    """How many values each setting has in the grid of Hydra's own sweeper."""
    grid = [*record.hydra.overrides.task]
    grid += [f"{name}={values}" for name, values in (record.hydra.sweeper.params or {}).items()]
    sizes = {}
    for override in OverridesParser.create().parse_overrides(grid):
        if override.is_sweep_override():
            is_glob = override.value_type == ValueType.GLOB_CHOICE_SWEEP
            sizes[override.key_or_group] = 2 if is_glob else len(list(override.sweep_iterator()))
    return sizes


# What gives each cell teacher states of its own.
_CACHE_CHANGES = (
    "teacher",
    "layer_selection",
    "corpus",
    "experiment",
    "training.precision",
    "outputs_dir",
    "objective",
    "method",
    "recipe",
    "student.vocabulary",
    "student.min_token_count",
    "student.path",
)


def _process() -> int:
    """Number of this process among those of a run; torchrun counts from 0."""
    return int(os.environ.get("RANK", "0"))


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tell_others(error: Exception, reason: str) -> bool:
    """Leaves the reason for the other processes of the run, and for torchrun's report.

    Returns:
        Whether this one is to print it too: what the config has wrong all of them find.
    """
    if _num_processes() == 1:
        return True
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from minilm_exp import processes

    processes.report_failure(reason)
    get_error_handler().record_exception(error)
    return processes.is_leader() or processes.have_met()


def _refuse_second_choices(arguments: list[str]) -> None:
    """Of two options of one group Hydra takes the last and says nothing."""
    conf = REPOSITORY / "conf"
    groups = {folder.relative_to(conf).as_posix() for folder in conf.rglob("*") if folder.is_dir()}
    chosen: dict[str, str] = {}
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("+")
        group = "relation_set" if name == "relations" else name
        if group not in groups:
            continue
        if group in chosen:
            raise ExperimentError(
                f"{argument}: {chosen[group]} has chosen an option of {group} before, and of two"
                " only one can count: leave one of them out"
            )
        chosen[group] = argument


def _explain_missing(error: MissingConfigException) -> str:
    """The option that there is not, the nearest that there is, and all of them."""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = error.options or sorted(
        path.stem for path in (REPOSITORY / "conf" / group).glob("*.yaml")
    )
    if not group or not options:
        return reason
    nearest = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{reason}{hint}\nOptions of {group}:\n{_listed(options)}"


def _explain(error: BaseException) -> str:
    """One message for people; the cause where Hydra wraps it."""
    if isinstance(error, ExperimentError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _explain_missing(error)
    if "No space left on device" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full: free space, or set outputs_dir to another disk; then resume=true"
    if "database or disk is full" in str(error):
        return "the disk of the tracking database is full: free space, or set outputs_dir"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        name = getattr(error, "filename", None) or "the folder of outputs"
        return f"{name} cannot be written: change its rights, or set outputs_dir"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        cause = error.__cause__
        return (
            f"{error}\n{cause}"
            if cause is not None and str(cause) not in str(error)
            else str(error)
        )
    if "hydra_plugins.hydra_submitit_launcher" in str(error):
        return "this hydra/launcher needs submitit: pip install 'minilm_exp[cluster]'"
    if isinstance(error, YAMLError):
        return f"not valid YAML: {' '.join(str(error).split())}"
    return f"unexpected {type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)"


def _redact_file(path: Path) -> None:
    """Takes secrets out of the record that Hydra keeps of a multirun."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if redact(text) != text:
            path.write_text(redact(text), encoding="utf-8")


class _RedactedStream:
    """What the terminal sees, without secrets: Hydra writes the overrides of a failed job to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.is_line_open = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text.startswith("Error executing job with overrides: "):
            return 0  # Hydra's, before the message that says what is wrong
        # A bar that was cut off leaves the line open.
        self.is_line_open = not text.endswith("\n") if text else self.is_line_open
        return int(self._stream.write(redact(text)))

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))


def _redact_output() -> None:
    """Every log record of every library, Hydra's echo of the overrides too, and the terminal."""
    if isinstance(sys.stderr, _RedactedStream):
        return
    sys.stdout, sys.stderr = _RedactedStream(sys.stdout), _RedactedStream(sys.stderr)
    make = logging.getLogRecordFactory()

    def make_redacted(*arguments: object, **named: object) -> logging.LogRecord:
        record = make(*arguments, **named)
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return record

    logging.setLogRecordFactory(make_redacted)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name, "ended where it was")


def main() -> None:
    """Runs Hydra and turns what goes wrong into one message and an exit status."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    # Makes Hydra raise instead of printing its own shortened traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _redact_output()
    # What a scheduler ends is recorded like what a person interrupts.
    signal.signal(signal.SIGTERM, _interrupt)
    speaks = _process() == 0 or wants_traceback
    own_stderr = sys.stderr
    if not speaks:  # the first process speaks for all; its log would lie beside this one's
        warnings.simplefilter("ignore")
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        sys.argv.append("hydra/job_logging=disabled")
    try:
        _refuse_second_choices(sys.argv[1:])
        job()
    except KeyboardInterrupt as error:
        name = getattr(error, "signal_name", "SIGINT")
        print(f"{error or name}; resume=true goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.Signals[name].value)
    except Exception as error:
        reason = redact(_explain(error))
        is_own = _tell_others(error, reason)
        if wants_traceback:
            raise
        if not _failed_jobs:
            where = f" in process {_process()}" if _process() > 0 else ""
            if is_own:
                start = "\n" if getattr(own_stderr, "is_line_open", False) else ""
                print(f"{start}error{where}: {reason}", file=own_stderr)
            sys.exit(1)
    finally:
        for folder in _sweep_folders:
            _redact_file(folder / "multirun.yaml")
        if len(_finished_jobs) > 1:
            from minilm_exp.summary import print_comparison

            print_comparison(_finished_jobs)
    # Of jobs in processes of their own only the sweep's record knows.
    failed = max(len(_failed_jobs), len(sweep_state.failed))
    if failed:
        sys.exit(f"error: {failed} of the runs failed, see above; the others stand")


if __name__ == "__main__":
    main()
