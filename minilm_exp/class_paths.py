"""Configs hold data. What Hydra would run of one is refused, but for the shipped parts.

Hydra builds callbacks, sweepers, launchers and log handlers from class paths, and a launcher of a
cluster writes settings into a shell script. A config may come from somebody else, so all of that is
looked at between the composing of a config and its first use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minilm_exp.errors import ExperimentError

# What run.py lets Hydra build by name; the sweeper adds Optuna's samplers itself.
CALLBACK = "minilm_exp.sweeping.SweepCallback"
SEARCH_SPACE = "minilm_exp.sweeping.note_trial"

_SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
_SHIPPED = {
    "hydra.callbacks.sweep._target_": (CALLBACK,),
    "hydra.launcher._target_": (
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        f"{_SUBMITIT}.LocalLauncher",
        f"{_SUBMITIT}.SlurmLauncher",
    ),
    "hydra.sweeper._target_": (
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
        "minilm_exp.launching.Sweeper",
    ),
    "hydra.sweeper.custom_search_space": (SEARCH_SPACE, None),
    # Lines, arguments and interpreter of a job script.
    "hydra.launcher.setup": (None,),
    "hydra.launcher.srun_args": (None,),
    "hydra.launcher.python": (None,),
}
_SAMPLERS = ("optuna.samplers.", "hydra_plugins.hydra_optuna_sweeper.")
_SAMPLER = re.compile(r"hydra\.sweeper\.sampler\.(.+\.)?(_target_|_partial_)")
_CODE_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_", "()",
              "_execution_whitelist_"}  # fmt: skip
_LOGGING = re.compile(r"hydra\.(job|hydra)_logging\.")
_LOG_CLASSES = ("logging.StreamHandler", "logging.FileHandler", "colorlog.ColoredFormatter")
_LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# Where text that becomes a mapping only later would escape what is looked at here.
_MAPPINGS = re.compile(
    r"hydra|hydra\.(callbacks|launcher|sweeper|job|sweeper\.sampler|job\.env_set"
    r"|launcher\.additional_parameters)"
    r"|hydra\.(job|hydra)_logging(\.(handlers|formatters|filters)(\.[^.]+)?)?"
)
# A variable such as PATH or LD_PRELOAD would choose what git and the libraries run.
_VARIABLES = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
              "TOKENIZERS_PARALLELISM"}  # fmt: skip
_SBATCH = {"begin", "clusters", "dependency", "licenses", "mail-type", "mail-user", "nice",
           "open-mode", "requeue", "reservation"}  # fmt: skip
_BUILDS_SETTINGS = re.compile(r"\$\{\s*oc\.(create|decode)\s*:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def refuse_code(config: DictConfig) -> None:
    """Refuses a composed config, with or without its `hydra`, that names code to run.

    Raises:
        ExperimentError: It has a class path that is not a shipped one, or what a shell would
            read.
    """
    for path, value in _settings(OmegaConf.to_container(config, resolve=False), ""):
        key = path.rpartition(".")[2]
        if path in _SHIPPED:
            shipped = value in _SHIPPED[path]
        elif _SAMPLER.fullmatch(path):
            shipped = isinstance(value, bool) or str(value).startswith(_SAMPLERS)
        elif key in _CODE_KEYS or path.startswith("hydra.callbacks."):
            shipped = path == "hydra.callbacks.sweep" and isinstance(value, dict)
        elif _MAPPINGS.fullmatch(path):
            shipped = value is None or isinstance(value, dict)
        elif _LOGGING.match(path):
            shipped = _is_plain_logging(key, value)
        elif path.startswith("hydra.job.env_set."):
            shipped = key in _VARIABLES
        elif path.startswith("hydra.launcher.additional_parameters."):
            shipped = key in _SBATCH and not isinstance(value, dict)
        else:
            shipped = not (isinstance(value, str) and _BUILDS_SETTINGS.search(value))
        if not shipped:
            raise ExperimentError(
                f"{path}={value!r:.100}: a config holds data, never class paths, code, or what a"
                " shell runs; only the shipped sweeps and launchers have some: leave it out (see"
                " docs/security.md)"
            )
    _refuse_lines(config)


def _settings(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every setting with its path, groups before what is in them."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        inner = f"{path}.{key}" if path else str(key)
        yield inner, value
        if isinstance(value, (dict, list)):
            yield from _settings(value, inner)


def _is_plain_logging(key: str, value: Any) -> bool:
    if key == "class":
        return value in _LOG_CLASSES
    if key == "filename":
        return isinstance(value, str) and value.endswith(".log")
    if isinstance(value, str) and value.startswith(("ext://", "cfg://")):
        return value in _LOG_STREAMS
    return not (isinstance(value, str) and _BUILDS_SETTINGS.search(value))


def _refuse_lines(config: DictConfig) -> None:
    """A line break in a setting of a launcher would be a line of the job script."""
    launcher = OmegaConf.select(config, "hydra.launcher") if "hydra" in config else None
    if launcher is None:
        return
    for name in launcher:
        try:
            value = OmegaConf.to_container(OmegaConf.create({name: launcher[name]}), resolve=True)
        except OmegaConfBaseException:
            continue  # Hydra says what is wrong with it
        found = [text for _, text in _settings(value, "") if isinstance(text, str)]
        if any(_CONTROL.search(text) for text in found):
            raise ExperimentError(
                f"hydra.launcher.{name}={found[0]!r:.100} has a line break or another control"
                " character, which would be a command of its own in a job script: leave it out"
            )
