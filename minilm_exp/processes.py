"""One run in several processes, as torchrun starts them: a leader, and those that follow it.

The leader reads and writes everything that there is one of: the run folder, MLflow, the terminal.
The others help it to distil. They speak through the store of torchrun, which outlives any of them,
and, while they train, through a process group.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from minilm_exp.errors import ExperimentError

T = TypeVar("T")
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_MESSAGE, _HEARD, _FAILURE = "message", "heard", "failure"
# A process that waits for the leader asks in this interval.
_INTERVAL_SECONDS = 1
_FAREWELL_SECONDS = 60
_store: dist.Store | None = None


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_leader() -> bool:
    """Whether this is the first process, or the only one."""
    return rank() == 0


def meet() -> None:
    """Finds the store; no process waits for another one yet."""
    global _store
    store, _, _ = next(dist.rendezvous("env://"))
    # A name of its own for each attempt, where torchrun starts the processes again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _store = dist.PrefixStore(f"minilm_exp/{attempt}", store)


def have_met() -> bool:
    """Whether this process can fail in a way of its own; before, all read the same config."""
    return _store is not None


def tell_followers(message: dict[str, Any] | None) -> None:
    """What `hear_leader` returns in the other processes; with None there is nothing to do.

    Then the leader waits a minute for them, since its end may be that of the store.
    """
    if _store is None:
        return
    _store.set(_MESSAGE, json.dumps(message))
    start = time.monotonic()
    while message is None and _store.add(_HEARD, 0) < size() - 1:
        if time.monotonic() - start > _FAREWELL_SECONDS:
            return
        time.sleep(_INTERVAL_SECONDS / 10)


def hear_leader() -> dict[str, Any] | None:
    """Waits for the leader's message, for as long as it prepares the corpus.

    Raises:
        ExperimentError: The leader has failed.
    """
    assert _store is not None
    while not _store.check([_MESSAGE]):
        if (reason := failure_of_others()) is not None:
            raise ExperimentError(reason)
        time.sleep(_INTERVAL_SECONDS)
    message: dict[str, Any] | None = json.loads(_store.get(_MESSAGE))
    _store.add(_HEARD, 1)
    return message


def report_failure(reason: str) -> None:
    """Leaves the reason for the others, before this process ends; the first one counts."""
    if _store is not None:
        _store.compare_set(_FAILURE, "", json.dumps([rank(), reason]))


def failure_of_others() -> str | None:
    """Why another process ended, where that is why this one does."""
    if _store is None or not _store.check([_FAILURE]):
        return None
    number, reason = json.loads(_store.get(_FAILURE))
    return None if number == rank() else f"process {number} of {size()}: {reason}"


def join(device: str) -> None:
    """Makes the process group, NCCL or gloo, and takes the GPU of this process."""
    if size() == 1:
        return
    is_gpu = device.startswith("cuda")
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if is_gpu else "gloo", store=_store, rank=rank(), world_size=size()
    )


def leave() -> None:
    """Ends the process group; from here on the leader is alone."""
    if not dist.is_initialized():
        return
    wait_for_all()
    dist.destroy_process_group()
    for name in _NAMES:
        os.environ.pop(name, None)
    # The library's memory of how many processes there were.
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def wait_for_all() -> None:
    """Returns when all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def from_leader(compute: Callable[[], T]) -> T:
    """What the leader computes, in all processes."""
    if not dist.is_initialized():
        return compute()
    values: list[Any] = [compute() if is_leader() else None]
    dist.broadcast_object_list(values)
    result: T = values[0]
    return result


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def sum_of_all(tensor: Tensor) -> Tensor:
    """The sum over the processes, in each of them."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_of_all(flag: bool) -> bool:
    """Whether it is true in any process."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(sum_of_all(torch.tensor(int(flag), device=device)))


def share(batch_size: int) -> int:
    """How many of a step's sequences each process computes.

    Raises:
        ExperimentError: They cannot be divided evenly.
    """
    if batch_size % size():
        raise ExperimentError(
            f"training.batch_size={batch_size} cannot be divided among {size()} processes: change"
            " it, or torchrun's --nproc-per-node"
        )
    return batch_size // size()


def sharded(model: nn.Module, layers: Iterable[nn.Module], device: str) -> nn.Module:
    """A copy of a frozen model of which each process holds its share (FSDP2).

    A layer is gathered while it is computed, so all processes must compute it equally often.
    """
    mesh = init_device_mesh("cuda" if device.startswith("cuda") else "cpu", (size(),))
    names = {id(module): name for name, module in model.named_modules()}
    copied = copy.deepcopy(model)
    for layer in layers:
        module = copied.get_submodule(names[id(layer)])
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(copied, mesh=mesh, reshard_after_forward=True)
    return copied


def give_back_shares(model: nn.Module) -> None:
    """Frees what a sharded model gathered for a forward pass that was left before its end."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
