"""Every error of a device without free memory is recognised."""

import pytest
import torch

from alignprop_fast.ops.errors import is_out_of_memory

FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
)
OTHERS = (
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("out of memory"),
)


@pytest.mark.parametrize(("errors", "full"), [(FULL, True), (OTHERS, False)])
def test_a_full_device_is_recognised(errors, full):
    assert [is_out_of_memory(error) for error in errors] == [full] * len(errors)
