"""Several processes of one run, as `accelerate launch` and torchrun start them, and how they notice that one is lost.

On GPUs NCCL carries weights and gradients, and nothing else. It does not notice that a process has ended: it waits for
TIMEOUT. Numbers and objects go through gloo, from host to host: there a process that ends closes its connections, and
the others fail at once. So the processes exchange something through gloo right before they reduce gradients.
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

# Longer than what one process does while the others wait for it (sample pictures, a checkpoint). Not much longer: a
# process that hangs is noticed this late.
TIMEOUT = timedelta(minutes=10)
BUCKET_BYTES = 64 * 2**20  # of tensors that are sent as one: far beyond what a call costs, far below a model

_by_hosts: torch.distributed.ProcessGroup | None = None  # None: the only group goes by the hosts, or there is none


class ProcessLost(RuntimeError):
    """Another process of this run has ended or hung."""


def start_processes(cpu: bool, options: dict[str, Any] | None = None) -> PartialState:
    """Join the processes of the run, which wait for each other here; on a GPU, make this process's the current one.

    `options` are those of `Accelerator`: an `InitProcessGroupKwargs` among their handlers sets another timeout.

    If NCCL waits in vain, the waiting thread should raise. By default a watchdog thread ends the process by SIGABRT
    instead. TORCH_NCCL_BLOCKING_WAIT turns the watchdog off and lets the waiting thread raise (torch's
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
    """Put around what all processes do together.

    Raises:
        ProcessLost: one of them did not take part.
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
    """Wait until all processes have come here."""
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
    """Whether the flag is set in any process; all of them must call this."""
    return largest(int(flag)) > 0


def largest(value: int) -> int:
    """The largest of the processes' values; all of them must call this."""
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
