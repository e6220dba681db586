"""Several processes of one run, as `accelerate launch` and torchrun start them: they meet, and notice who is gone.

On GPUs numbers and objects go by the hosts (gloo), where a process that ends closes its connections and the others fail
at once. NCCL, which carries weights and gradients alone, notices nobody's end: it waits for TIMEOUT. So the processes
meet by the hosts right before they reduce gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from alignprop_fast.ops.errors import is_out_of_memory
from alignprop_fast.training.launcher import drop_empty_places

# Longer than what one process does while the others wait for it (sample pictures, a checkpoint), and no longer: it is
# how late a process that hangs is noticed. One that ends is noticed at once on the CPU.
TIMEOUT = timedelta(minutes=10)
BUCKET_BYTES = 64 * 2**20  # of tensors that are sent as one: far beyond what a call costs, far below a model

_by_hosts: torch.distributed.ProcessGroup | None = None  # None: the only group goes by the hosts, or there is none


class ProcessLost(RuntimeError):
    """Another process of this run has ended or hung."""


def start_processes(cpu: bool, options: dict[str, Any] | None = None) -> PartialState:
    """This process's place among those of the run, which wait for each other here; on a GPU its own becomes current.

    `options` are those of `Accelerator`: an `InitProcessGroupKwargs` among their handlers sets another timeout.

    With NCCL a wait that is in vain is to raise here. By default its watchdog, a thread, ends the process by SIGABRT;
    with TORCH_NCCL_BLOCKING_WAIT there is no watchdog, and the waiting thread itself raises (torch's
    ProcessGroupNCCL.cpp, the constructor and WorkNCCL::synchronizeInternal). A value that is set already stays.

    Raises:
        ValueError: a launcher's variable that holds no number.
    """
    global _by_hosts
    drop_empty_places()
    handlers = (options or {}).get("kwargs_handlers") or []
    timeout = next((one.timeout for one in handlers if isinstance(one, InitProcessGroupKwargs)), TIMEOUT)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    state = PartialState(cpu=cpu, timeout=timeout)
    if state.num_processes > 1 and _by_hosts is None and torch.distributed.get_backend() != "gloo":
        _by_hosts = torch.distributed.new_group(backend="gloo", timeout=timeout)
    return state


@contextmanager
def raise_if_process_lost() -> Iterator[None]:
    """Around what all processes do together.

    Raises:
        ProcessLost: one of them did not come.
    """
    try:
        yield
    except RuntimeError as error:
        if PartialState().num_processes == 1 or is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:160]
        raise ProcessLost(
            "waited in vain for another process, which has ended or hangs: see its message, then go on from the last "
            f"checkpoint ({said})"
        ) from error


def wait_for_all() -> None:
    """Returns in no process before all have come here."""
    if PartialState().num_processes > 1:
        with raise_if_process_lost():
            torch.distributed.barrier(group=_by_hosts)


@contextmanager
def main_process_first() -> Iterator[None]:
    """The block in the main process, then in all others."""
    is_main = PartialState().is_main_process
    if not is_main:
        wait_for_all()
    yield
    if is_main:
        wait_for_all()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    return largest(int(flag)) > 0


def largest(value: int) -> int:
    """The largest of the processes' values; all of them must ask."""
    if PartialState().num_processes == 1:
        return value
    with raise_if_process_lost():
        found = torch.tensor(value, dtype=torch.int64)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=_by_hosts)
    return int(found.item())


def of_all_processes(value: Any) -> list[Any]:
    """The (picklable) value of each process, by its index."""
    count = PartialState().num_processes
    if count == 1:
        return [value]
    found: list[Any] = [None] * count
    with raise_if_process_lost():
        torch.distributed.all_gather_object(found, value, group=_by_hosts)
    return found


@torch.no_grad()
def sum_in_place(tensors: Sequence[torch.Tensor]) -> None:
    """Replace the tensors, in every process, by their sums over the processes. Takes a bucket more for a moment."""
    for bucket in buckets(tensors):
        flat = _flatten_dense_tensors(bucket)
        with raise_if_process_lost():
            torch.distributed.all_reduce(flat)
        torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))


@torch.no_grad()
def copy_of_first(tensors: Sequence[torch.Tensor]) -> None:
    """Replace the tensors, in every process, by those of the first. Takes a bucket more for a moment."""
    for bucket in buckets(tensors):
        flat = _flatten_dense_tensors(bucket)
        with raise_if_process_lost():
            torch.distributed.broadcast(flat, src=0)
        torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))


def buckets(tensors: Sequence[torch.Tensor], most_bytes: int = BUCKET_BYTES) -> Iterator[list[torch.Tensor]]:
    """The tensors in their order, cut into lists of one dtype and device that hold at most so many bytes, or one."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        kinds = {(one.dtype, one.device) for one in (*bucket, tensor)}
        if bucket and (len(kinds) > 1 or sum(one.nbytes for one in (*bucket, tensor)) > most_bytes):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
