"""Which implementation serves a tensor, for the ops that have a Triton kernel and a plain PyTorch path."""

from importlib.util import find_spec

import torch
from torch._subclasses import FakeTensor

_HAS_TRITON = find_spec("triton") is not None


def backend(x: torch.Tensor) -> str:
    """ "triton" for fp32, fp16 and bf16 on a CUDA device where Triton is installed, else "reference"."""
    low = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return "triton" if x.is_cuda and low and _HAS_TRITON else "reference"


def is_traced(x: torch.Tensor) -> bool:
    """Whether x stands for a tensor to come, so that there is nothing to run, to time or to fail."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)
