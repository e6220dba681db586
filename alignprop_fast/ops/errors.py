"""One-line messages of errors, and work that may run out of device memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from alignprop_fast.ops.garbage import collect_garbage

# Messages of libraries that allocate memory themselves and do not raise OutOfMemoryError.
_SAID = (
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    "DEVICE_ALLOCATION_FAILED",  # cuDNN 9
    "CUBLAS_STATUS_NOT_INITIALIZED",  # of cublasCreate on a full card
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class OutOfMemory:
    """The result of work that ran out of device memory. reason: the device's message in one line."""

    reason: str


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty.

    It has no full stop at its end, and no reference of transformers to a traceback that is not shown.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0].partition(" Please check out the root cause")[0].rstrip(".:;") if lines else ""
    return line or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out: torch's OutOfMemoryError, or a CUDA, cuBLAS or cuDNN error that means the same."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def unless_out_of_memory(work: Callable[[], Result]) -> Result | OutOfMemory:
    """work(), or `OutOfMemory`. When this returns, everything that the failed run held is free for an alternative.

    Do not run the alternative inside `except`: there the error's traceback holds the failed run's frames, and they hold
    its graph.
    """
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        error.__traceback__ = None  # other code may hold the error
    collect_garbage()  # hooks and closures of the run refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # reserved memory is fragmented into pieces of the failed run's sizes
    return OutOfMemory(reason)
