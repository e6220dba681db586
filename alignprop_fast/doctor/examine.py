"""The sections of an examination, one after the other, each in its own try."""

from collections.abc import Callable, Sequence

import torch

from alignprop_fast.doctor.report import Report


def examine(
    device: torch.device,
    quick: bool = False,
    dtypes: Sequence[torch.dtype] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Report:
    """Examine the device; what fails is switched off in this process (`ops.switched_off`). Raises nothing.

    Args:
        device: a CUDA device or the CPU.
        quick: the kernels alone, under ten seconds beside compiling; else everything.
        dtypes: to check in; None: bf16 when quick, else bf16, fp32 and, on a GPU, fp16.
        tell: is given the name of what comes next.
    """
    return Report(str(device), quick)
