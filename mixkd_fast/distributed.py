"""Ranks, gathers and one voice: thin helpers over torch.distributed that also work in a single process."""

import functools
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether a launcher (deepspeed, torchrun) has described this process's place among others."""
    return all(name in os.environ for name in _LAUNCHER_VARIABLES)


def find_own_tools() -> None:
    """Let build tools of this environment (ninja) be found also when it is called by path and not activated."""
    own_tools = os.path.dirname(sys.executable)
    if own_tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), own_tools])


def rank() -> int:
    """This process's number among all ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def maximum_over_ranks(values: Tensor) -> Tensor:
    """The largest value of every element over all ranks; takes and gives CPU tensors."""
    if world_size() == 1:
        return values
    there = values.to("cuda") if dist.get_backend() == "nccl" else values
    dist.all_reduce(there, op=dist.ReduceOp.MAX)
    return there.cpu()


def sum_on_host(values: Tensor) -> Tensor:
    """Sum a CPU tensor over all ranks, in place, without the GPUs: nobody waits for what they are doing."""
    if world_size() > 1:
        dist.all_reduce(values, group=_host_group())
    return values


def maximum_on_host(number: int) -> int:
    """The largest of a number over all ranks, without the GPUs: nobody waits for what they are doing. Collective."""
    if world_size() == 1:
        return number
    here = torch.tensor([number], dtype=torch.int64)
    dist.all_reduce(here, op=dist.ReduceOp.MAX, group=_host_group())
    return int(here)


@functools.cache
def _host_group() -> dist.ProcessGroup | None:
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None


@functools.cache
def _patient_group() -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def gather_objects(value: Any, patient: bool = False) -> list[Any]:
    """Every rank's value, in rank order, on every rank.

    Args: patient = wait for the others for days, not for the half hour of other exchanges: for ranks that have less
    to do than others. `watching` tells of those that are gone.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_patient_group() if patient else None)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_error(error: BaseException | None) -> str | None:
    """The message of the first rank that failed, known to all ranks, or None. Every rank must call it."""
    message = None if error is None else f"{type(error).__name__}: {error}"
    return next((text for text in gather_objects(message) if text is not None), None)


def share_cores(threads: int | None) -> None:
    """Set this rank's CPU threads: as asked, else an equal share of the cores (launchers otherwise leave 1, or all)."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // on_this_machine))


def say(message: str) -> None:
    """Print a line once, from rank 0, above a progress bar that may be there."""
    if rank() == 0:
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)


def choose_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
