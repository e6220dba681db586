"""Several processes of one run, as `accelerate launch` and torchrun start them: they meet, and notice who is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, gather_object

# Longer than what one process does while the others wait for it (sample pictures, a checkpoint), and no longer: it is
# how late a process that hangs is noticed. One that ends is noticed at once on the CPU.
TIMEOUT = timedelta(minutes=10)


class ProcessLost(RuntimeError):
    """Another process of this run has ended or hung."""


def start_processes(cpu: bool, options: dict[str, Any] | None = None) -> PartialState:
    """This process's place among those of the run, which wait for each other here; on a GPU its own becomes current.

    `options` are those of `Accelerator`: an `InitProcessGroupKwargs` among their handlers sets another timeout.
    """
    handlers = (options or {}).get("kwargs_handlers") or []
    timeout = next((one.timeout for one in handlers if isinstance(one, InitProcessGroupKwargs)), TIMEOUT)
    return PartialState(cpu=cpu, timeout=timeout)


@contextmanager
def meeting() -> Iterator[None]:
    """Around what all processes do together.

    Raises:
        ProcessLost: one of them did not come.
    """
    try:
        yield
    except RuntimeError as error:
        if PartialState().num_processes == 1:
            raise
        raise ProcessLost(
            "waited in vain for another process, which has ended or hangs: see its message, then go on from the last "
            "checkpoint"
        ) from error


class MeetingAccelerator(Accelerator):
    """An `Accelerator` whose processes notice who is gone (`ProcessLost`)."""

    def gather(self, tensor: Any) -> Any:
        with meeting():
            return super().gather(tensor)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        with meeting():
            return super().reduce(tensor, reduction, scale)

    def wait_for_everyone(self) -> None:
        with meeting():
            super().wait_for_everyone()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    with meeting():
        found = torch.tensor(float(flag), device=state.device)
        torch.distributed.all_reduce(found)
    return found.item() > 0


def of_all_processes(value: Any) -> list[Any]:
    """The (picklable) value of each process, by its index."""
    with meeting():
        return gather_object([value])


def parts_and_peak(parts: Mapping[str, float], peak_bytes: int) -> tuple[dict[str, float], int]:
    """Means over the processes of the reward's parts that all of them report, and the largest peak."""
    found = of_all_processes((dict(parts), peak_bytes))
    common = [name for name in parts if all(name in theirs for theirs, _ in found)]
    return {name: fmean(theirs[name] for theirs, _ in found) for name in common}, max(peak for _, peak in found)


def sum_in_place(tensor: torch.Tensor) -> None:
    """Replace the tensor, in every process, by its sum over the processes."""
    with meeting():
        torch.distributed.all_reduce(tensor)
