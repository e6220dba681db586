"""Whether an error says that the device's memory is full."""

import torch

# What libraries say that take memory of their own and know no OutOfMemoryError.
_SAID = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out: torch's OutOfMemoryError, or a CUDA, cuBLAS or cuDNN error that means the same."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)
