"""The one place that starts kernels: on the device of their tensors, compiled in the same way everywhere."""

from typing import Any

import torch
import triton

# Asked for, and not left to Triton, whose default is off from 3.10 on: without it sums of products round twice and
# take an instruction more each. Compiling ahead of time asks for the same.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its first argument, a tensor. An empty grid starts nothing.

    Triton takes the device and the stream that are current, which need not be those of the tensors.
    """
    device = arguments[0].device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options, **COMPILE_OPTIONS)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **options, **COMPILE_OPTIONS)
