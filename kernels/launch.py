"""Starts every kernel, on the device of its tensors and with the same compile options."""

from typing import Any

import torch
import triton

# Fused multiply-add, set here because Triton 3.10 turned its default off. Without it a * b + c rounds twice and takes
# one instruction more. Compiling ahead of time uses the same option.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict) -> None:
    """Start a kernel on the device of its first argument, a tensor. An empty grid starts nothing.

    Triton launches on the current device, which can be another one than the tensors'.
    """
    index = arguments[0].get_device()  # -1 on a CPU, where the interpreter runs
    if index < 0 or index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(index):
        kernel[grid](*arguments, **options)


class Prepared:
    """A kernel that is ready to start on tensors: what follows from their sizes is computed once.

    Keep it by these sizes (`functools.cache`): computing them anew takes longer than allocating a tensor.

    Args:
        grid: as of `launch`.
        numbers: the last arguments.
        options: constants of the kernel, warps and stages.
    """

    def __init__(self, kernel: triton.JITFunction, grid: tuple[int, ...], *numbers: float, **options: Any):
        self._kernel, self._grid, self._numbers, self._options = kernel, grid, numbers, options | COMPILE_OPTIONS

    def __call__(self, *arguments: Any) -> None:
        """Start it with these as the first arguments, of which the first is a tensor."""
        launch(self._kernel, self._grid, arguments + self._numbers, self._options)


# Triton's own versions of these two go through a wrapper for its compiler, which takes as long as allocating a tensor.


def cdiv(n: int, block: int) -> int:
    """n / block, rounded up."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
