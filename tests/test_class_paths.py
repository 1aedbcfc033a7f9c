"""Configs hold data: nothing that they name is run, but for the shipped sweeps and launchers."""

import re

import pytest
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from running import run

from minilm_exp.class_paths import refuse_code
from minilm_exp.errors import ExperimentError
from minilm_exp.resolvers import register_resolvers

SWEEPS = sorted(path.stem for path in (REPOSITORY / "sweeps").glob("*.yaml"))
LAUNCHERS = ("basic", "joblib", "submitit_local", "submitit_slurm")
SAMPLERS = ("grid", "tpe", "random", "cmaes", "nsgaii", "nsgaiii")


@pytest.fixture(scope="module")
def composed():
    """Gives the config with its `hydra`, as Hydra has it before it uses any of it."""
    register_resolvers()

    def made(*overrides):
        with initialize_config_dir(str(REPOSITORY / "conf")):
            return compose("config", list(overrides), return_hydra_config=True)

    return made


@pytest.mark.parametrize("sweep", SWEEPS)
def test_shipped_sweeps_are_allowed(sweep, composed):
    """A sweep of the repository that its own entrypoint refuses."""
    refuse_code(composed(f"sweeps={sweep}"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_shipped_launchers_are_allowed(launcher, composed):
    """Cells that cannot run beside each other, or on a cluster."""
    config = composed("sweeps=search", f"hydra/launcher={launcher}")
    refuse_code(config)
    if launcher == "submitit_slurm":
        for name, value in (("partition", "gpu"), ("additional_parameters", {"nice": 1})):
            OmegaConf.update(config, f"hydra.launcher.{name}", value, force_add=True)
        refuse_code(config)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_of_optuna_are_allowed(sampler, composed):
    """A search that only the shipped sampler can make."""
    refuse_code(composed("sweeps=search", f"hydra/sweeper/sampler={sampler}"))


SYSTEM = {"_target_": "os.system", "command": "touch x"}


@pytest.mark.parametrize(
    "path, value",
    [
        ("x._target_", "os.system"),
        ("teacher._target_", "os.system"),
        ("student.config", SYSTEM),
        ("objective.terms.relations", SYSTEM),
        ("recipe.stages", {"one": {"student": SYSTEM}}),
        ("tasks.next_passage", SYSTEM),
        ("corpus.files", [SYSTEM]),
        ("corpus.datasets", [[SYSTEM]]),
        ("x.deep", {"a": [{"b": {"_args_": ["touch x"]}}]}),
        ("x.deep", {"()": "os.system"}),
        ("x", "${oc.create:'{_target_: os.system}'}"),
        ("hydra.callbacks.evil", SYSTEM),
        ("hydra.callbacks.evil", "${x}"),
        ("hydra.callbacks.sweep", "${x}"),
        ("hydra.callbacks.sweep._target_", "minilm_exp.sweeping.os.system"),
        ("hydra.callbacks.sweep._target_", "${x}"),
        ("hydra.callbacks.sweep.more", 1),
        ("hydra.callbacks", "${x}"),
        ("hydra.launcher._target_", "os.system"),
        ("hydra.launcher", "${x}"),
        ("hydra.launcher.setup", ["touch x"]),
        ("hydra.launcher.srun_args", ["--task-prolog=x"]),
        ("hydra.launcher.python", "./python"),
        ("hydra.launcher.partition", "gpu\ntouch x"),
        ("hydra.launcher.name", "${corpus.text_column}"),
        ("hydra.launcher.additional_parameters.nice", "1\rtouch x"),
        ("hydra.launcher.additional_parameters.export", "ALL,LD_PRELOAD=x.so"),
        ("hydra.sweeper._target_", "os.system"),
        ("hydra.sweeper.sampler._target_", "os.system"),
        ("hydra.sweeper.sampler.seed", SYSTEM),
        ("hydra.sweeper.custom_search_space", "os.system"),
        ("hydra.sweeper.custom_search_space", ["os.system"]),
        ("hydra.sweeper.storage", SYSTEM),
        ("hydra.job_logging.handlers.x", {"()": "os.system"}),
        ("hydra.job_logging.handlers.x", "${x}"),
        ("hydra.job_logging.handlers.file.class", "logging.handlers.SMTPHandler"),
        ("hydra.job_logging.handlers.file.filename", "/root/.bashrc"),
        ("hydra.job_logging.handlers.console.stream", "ext://os.environ"),
        ("hydra.job_logging.formatters.simple.class", "evil.Formatter"),
        ("hydra.job_logging.filters.x", {"()": "os.system"}),
        ("hydra.hydra_logging.handlers.x", {"class": "evil.Handler"}),
        ("hydra.hydra_logging", "${x}"),
        ("hydra.job.env_set.GIT_EXTERNAL_DIFF", "./evil"),
        ("hydra.job.env_set.LD_PRELOAD", "evil.so"),
        ("hydra.job.env_set", "${x}"),
    ],
)
def test_code_in_a_config_is_refused(path, value, composed):
    """A file of somebody else that runs a program before the run has begun."""
    config = composed("sweeps=search", "hydra/launcher=submitit_slurm", "hydra.mode=MULTIRUN")
    OmegaConf.set_struct(config, False)
    OmegaConf.set_readonly(config.hydra, False)
    config.corpus.text_column = "gpu\ntouch x"
    for node in (config, config.hydra):
        node._set_flag(["struct", "readonly"], [False, False])
    plain = OmegaConf.to_container(config, resolve=False)
    *groups, last = path.split(".")
    node = plain
    for group in groups:
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            pytest.fail(f"{path} is not there any more")
    node[last] = value
    with pytest.raises(ExperimentError, match=re.escape(".".join(path.split(".")[:2]))):
        refuse_code(OmegaConf.create(plain))


def run_in(folder, *overrides):
    is_chosen = any(override.startswith("experiment=") for override in overrides)
    small = [] if is_chosen else ["experiment=smoke"]
    return run(f"{folder}/o", *small, *overrides, cwd=folder)


HOSTILE_FILES = {
    "callback": "hydra:\n  callbacks:\n    evil: {_target_: os.system, command: touch evil}\n",
    "callback of the package": (
        "hydra:\n  callbacks:\n    evil: {_target_: minilm_exp.sweeping.SweepCallback}\n"
    ),
    "handler": (
        "hydra:\n  job_logging:\n    handlers:\n"
        "      evil: {(): os.system, command: touch evil}\n    root: {handlers: [evil]}\n"
    ),
    "handler of Hydra": (
        "hydra:\n  hydra_logging:\n    handlers:\n"
        "      evil: {class: logging.FileHandler, filename: evil}\n    root: {handlers: [evil]}\n"
    ),
    "teacher": "teacher: {_target_: os.system, command: touch evil}\n",
    "environment": "hydra:\n  job:\n    env_set: {GIT_EXTERNAL_DIFF: touch evil}\n",
    "made of text": "x: \"${oc.create:'{_target_: os.system}'}\"\n",
}


@pytest.mark.integration
@pytest.mark.parametrize("content", HOSTILE_FILES.values(), ids=HOSTILE_FILES.keys())
def test_an_experiment_file_of_somebody_else_runs_nothing(content, tmp_path):
    """A command that is run while the config is being composed, before any check of ours."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    file = tmp_path / "conf" / "experiment" / "theirs.yaml"
    file.write_text(f"# @package _global_\n{content}")
    done = run_in(tmp_path, "--config-dir", f"{tmp_path}/conf", "experiment=theirs")
    assert done.status == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf"]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "docs/security.md" in done.stderr


@pytest.mark.integration
@pytest.mark.parametrize("content", ["!!python/object/apply:os.system ['touch evil']", "a: b: c"])
def test_yaml_that_makes_objects_is_refused(content, tmp_path):
    """Python's own objects in a file of configs, or a parser's traceback."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "theirs.yaml").write_text(f"x: {content}\n")
    done = run_in(tmp_path, "--config-dir", f"{tmp_path}/conf", "experiment=theirs")
    assert done.status == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf"]
    assert done.stderr.startswith("error: not valid YAML:") and "theirs.yaml" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.integration
def test_a_grid_over_class_paths_runs_nothing(tmp_path):
    """Values of a sweep that are looked at by nobody, as only their jobs have them."""
    done = run_in(tmp_path, "-m", "+x._target_=os.system,os.popen")
    assert done.status == 1 and "x._target_='os.system'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.integration
def test_unknown_resolvers_are_named(tmp_path):
    """A traceback, or a resolver that a config could bring along."""
    done = run_in(tmp_path, "+x=${evil:1}")
    assert done.status == 1
    assert "Unsupported interpolation type evil" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_in_the_package_evaluates_text_or_starts_a_shell():
    """An eval, a pickle or a shell that a later change brings in."""
    wrong = re.compile(
        r"(?<![.\w])(eval|exec|compile)\(|\bpickle\.(load|Unpick)|shell=True|os\.(system|popen|exec|spawn)|joblib\.load"
        r"|yaml\.(load|unsafe_load|full_load)\(|allow_pickle=True|weights_only=False|torch\.load\("
    )
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for folder in ("minilm_exp", "benchmarks")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if wrong.search(line) and not line.lstrip().startswith("#")
    ]
    assert found == []


def test_servers_are_for_this_machine_only():
    """A database of runs that everybody in the network can read and delete."""
    command = re.compile(r"\b(mlflow (ui|server)|optuna-dashboard)\b(?! and| binds?)(.*)")
    files = [REPOSITORY / name for name in ("README.md", "Makefile", "CONTRIBUTING.md", "run.py")]
    for folder, pattern in (("docs", "*.md"), ("sweeps", "*.md"), ("conf", "*.yaml"),
                            ("minilm_exp", "*.py"), ("benchmarks", "*.py")):  # fmt: skip
        files += sorted((REPOSITORY / folder).rglob(pattern))
    found = [
        (path.name, match[0])
        for path in files
        for match in command.finditer(path.read_text(encoding="utf-8"))
    ]
    assert len(found) >= 6
    assert [(name, text) for name, text in found if "--host 127.0.0.1" not in text] == []
