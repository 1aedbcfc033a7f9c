"""Kills runs and sweeps at random moments and compares them with runs that nobody touched.

    make chaos                      # or: python tests/chaos --kills 40 --seed 1

Each scenario is run once undisturbed. Then it is started, killed at a random moment of the time
that this took, and started again with the same command, until it ends; it counts as equal where
weights, scores, validation losses and every step and value in MLflow are the same, bit for bit,
each run is in MLflow once and none is left there as running. What happened is printed as the table
of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from running import Started, client_of, histories
from test_processes import start_together

_RUN = ["experiment=smoke", "training.max_steps=60", "training.checkpoint_steps=7",
        "training.logging_steps=4", "training.evaluation_steps=15", "training.hidden_dropout=0.1",
        "training.attention_dropout=0.1", "task_training.checkpoint_steps=2",
        "resume=true"]  # fmt: skip
_SWEEP = ["-m", "sweeps=relation_set", "experiment=smoke", "task=none",
          "training.max_steps=20", "training.checkpoint_steps=4",
          "training.hidden_dropout=0.1"]  # fmt: skip


@dataclass
class Scenario:
    """What is killed.

    Attributes:
        name: For the table.
        overrides: Of run.py.
        num_processes: Of the run.
        signals: One is drawn for each kill.
    """

    name: str
    overrides: list[str]
    num_processes: int = 1
    signals: tuple[int, ...] = (signal.SIGKILL,)


SCENARIOS = [
    Scenario("distillation and fine-tuning", _RUN),
    Scenario("the same, by SIGTERM or SIGINT", _RUN, 1, (signal.SIGTERM, signal.SIGINT)),
    Scenario("two stages (teacher assistant)", [*_RUN, "recipe=teacher_assistant", "task=none"]),
    Scenario("two processes, one of them killed", [*_RUN, "task=none"], 2),
    Scenario("sweep of five runs", _SWEEP),
]


@dataclass
class Outcome:
    """What the kills of a scenario led to."""

    num_kills: int = 0
    num_episodes: int = 0
    moments: Counter = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def start(scenario: Scenario, outputs: Path) -> list[Started]:
    """The processes of the scenario's command."""
    if scenario.num_processes > 1:
        return start_together(outputs, scenario.num_processes, *scenario.overrides)
    return [Started(outputs, *scenario.overrides)]


def found_in(outputs: Path) -> dict[str, object]:
    """All that must be equal, by names that do not hang on ids and times."""
    found: dict[str, object] = {}
    for file in sorted(outputs.glob("runs/*/result.json")):
        result = json.loads(file.read_text("utf-8"))
        key = result["run_key"][:10]
        if key in found:
            found[f"{key} again"] = file.parent.name
        weights = file.parent / "student" / "model.safetensors"
        found[key] = [
            result["status"],
            weights.read_bytes() if weights.is_file() else None,
            result["validation_losses"],
            result["metrics"],
        ]
        left = [name for name in ("checkpoints", "finetuning") if (file.parent / name).exists()]
        found[f"{key} leaves"] = left
    client = client_of(outputs)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, max_results=5000):
        tags = run.data.tags
        name = f"MLflow {tags.get('run_key', '')[:10]} {tags.get('mlflow.runName')}"
        if run.info.status != "FINISHED":
            # A trial that was killed before it became a run of its own may say so.
            if run.info.status == "RUNNING" or not tags.get("mlflow.parentRunId"):
                found[f"{name} {run.info.status}"] = run.info.run_id
            continue
        if name in found:
            found[f"{name} again"] = run.info.run_id
        found[name] = histories(outputs, run.info.run_id)
    return found


def moment(outputs: Path) -> str:
    """What the killed run was about."""
    places = [*outputs.glob("runs/*/"), *outputs.glob("runs/*/stages/*/")]
    if not places:
        return "before its folder"
    if any((place / "checkpoints" / ".partial").exists() for place in places):
        return "writing a checkpoint"
    if any((place / "finetuning").exists() for place in places):
        return "fine-tuning"
    if any((place / "checkpoints").exists() for place in places):
        return "distilling"
    return "before, between or after"


def finish(scenario: Scenario, outputs: Path) -> None:
    for process in start(scenario, outputs):
        done = process.wait(600)
        if done.status:
            raise SystemExit(f"{scenario.name} ends with {done.status}:\n{done.both[-3000:]}")


def disturb(
    scenario: Scenario, expected: dict[str, object], seconds: float, draw: random.Random,
    kills: int, folder: Path,
) -> Outcome:  # fmt: skip
    """Kills until so many kills met a living process."""
    outcome = Outcome()
    while outcome.num_kills < kills:
        outputs = folder / f"episode-{outcome.num_episodes}"
        outcome.num_episodes += 1
        for _ in range(draw.randint(1, 3)):
            processes, begin = start(scenario, outputs), time.monotonic()
            end = begin + draw.uniform(0, seconds)
            victim, number = draw.choice(processes), draw.choice(scenario.signals)
            while victim.is_alive and time.monotonic() < end:
                time.sleep(0.002)
            if not victim.is_alive:  # the machine has become faster
                seconds = time.monotonic() - begin
                [process.wait(60) for process in processes]
                break
            outcome.moments[moment(outputs)] += 1
            victim.send(number)
            outcome.num_kills += 1
            print(f"  {scenario.name}: kill {outcome.num_kills}", file=sys.stderr, flush=True)
            victim.wait(90)
            for process in processes:
                if process is not victim:  # as torchrun does
                    process.send(signal.SIGTERM)
                    process.wait(90)
        finish(scenario, outputs)
        found = found_in(outputs)
        differences = [
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        ]
        if differences:
            kept = outputs.with_name(f"different-{outcome.num_episodes}")
            outputs.rename(kept)
            outcome.differences.append(f"{sorted(differences)} in {kept}")
            print(f"  {scenario.name}: {outcome.differences[-1]}", flush=True)
        else:
            shutil.rmtree(outputs)
    return outcome


def main() -> None:
    """Prints a row for each scenario; its status is 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="in all")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--only", help="scenarios with this in their name")
    given = parser.parse_args()
    chosen = [s for s in SCENARIOS if not given.only or given.only in s.name]
    draw = random.Random(given.seed)
    print("| what | kills | runs | equal | when |\n| --- | --- | --- | --- | --- |", flush=True)
    failed = False
    for number, scenario in enumerate(chosen):
        folder = Path(tempfile.mkdtemp(prefix="minilm_exp-chaos-"))
        kills = given.kills // len(chosen) + (number < given.kills % len(chosen))
        begin = time.monotonic()
        finish(scenario, folder / "undisturbed")
        seconds = time.monotonic() - begin
        expected = found_in(folder / "undisturbed")
        outcome = disturb(scenario, expected, seconds, draw, kills, folder)
        equal = outcome.num_episodes - len(outcome.differences)
        when = ", ".join(f"{name} {n}" for name, n in outcome.moments.most_common())
        print(
            f"| {scenario.name} | {outcome.num_kills} | {outcome.num_episodes} | {equal} |"
            f" {when} |",
            flush=True,
        )
        failed |= bool(outcome.differences)
        if not outcome.differences:
            shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()
