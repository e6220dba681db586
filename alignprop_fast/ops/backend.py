"""Which implementation serves a tensor, and the way back to plain PyTorch where one fails.

Triton compiles when a kernel is first started, with a C compiler and a driver that may be missing, for a GPU whose
shared memory or registers may not do. None of that may end a run: what fails is switched off for this process, with one
line, and its plain path goes on from there (`ops.switched_off`).
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor

from alignprop_fast.ops import switched_off
from alignprop_fast.ops.errors import is_out_of_memory

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_probed: set[torch.device] = set()


def backend(x: torch.Tensor, op: str) -> str:
    """ "triton" where the package's kernels of this op serve x, else "reference".

    They serve fp32, fp16 and bf16 on NVIDIA's GPUs where Triton is installed and works: the first tensor on a device
    tries it. Under torch.compile, with fake tensors and while a CUDA graph is captured nothing is tried.
    """
    if not (x.is_cuda and x.dtype in _DTYPES and _HAS_TRITON and x.numel() > 0) or only_plain(x):
        return "reference"
    if not is_traced(x) and x.device not in _probed:
        _probe(x.device)
    off = switched_off.reason("triton") or switched_off.reason(f"{op}.triton")
    return "triton" if off is None else "reference"


def is_traced(x: torch.Tensor) -> bool:
    """Whether x stands for a tensor to come, so that there is nothing to run, to time or to fail."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def only_plain(x: torch.Tensor) -> bool:
    """Whether plain PyTorch alone serves x's device, and says so once: any but the CPU and NVIDIA's GPUs.

    AMD's GPUs call themselves "cuda" too; the kernels here were neither written for them nor compiled for one.
    """
    if x.device.type in ("cpu", "meta") or (x.is_cuda and torch.version.hip is None):
        return False
    if not is_traced(x):
        device = "AMD's GPUs" if x.is_cuda else x.device.type
        switched_off.switch_off("kernels", f"there are none for {device}, where plain PyTorch serves every op")
    return True


def attempt(
    name: str,
    first: Callable[Arguments, Result],
    plain: Callable[Arguments, Result],
    *arguments: Arguments.args,
    **keywords: Arguments.kwargs,
) -> Result:
    """first(*arguments), and from its first failure in this process on plain(*arguments), which returns the same.

    Not for tensors that are traced. A full device is no failure of `first`, and is raised; so is what happens while a
    CUDA graph is captured, which is lost. Where `plain` fails too the arguments are at fault.

    name: what is switched off then.
    """
    if switched_off.reason(name) is not None:
        return plain(*arguments, **keywords)
    try:
        return first(*arguments, **keywords)
    except Exception as error:  # of compilers, drivers and libraries: there is no list of them
        if is_out_of_memory(error) or _is_capturing():
            raise
        reason = f"{type(error).__name__}: {error}"
    # Not in the handler, whose traceback would keep the tensors of what failed.
    result = plain(*arguments, **keywords)
    switched_off.switch_off(name, reason)
    return result


def or_plain(
    op: str, plain: Callable[Arguments, Result]
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorator of a function that starts this op's kernels: `attempt` with the plain path behind it."""

    def decorated(kernel: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(kernel)
        def either(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
            return attempt(f"{op}.triton", kernel, plain, *arguments, **keywords)

        return either

    return decorated


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _probe(device: torch.device) -> None:
    """Start a small kernel and compare; what is wrong with Triton on this device switches it off."""
    if _is_capturing():
        return
    try:
        from alignprop_fast.kernels import geglu

        uv = torch.linspace(-2, 2, 512, device=device).view(2, 256)
        u, v = uv.chunk(2, dim=-1)
        # Errors of fp32; a kernel that did not run, or ran elsewhere, is off by the values themselves.
        if not torch.allclose(geglu.geglu_forward(uv), u * F.gelu(v), rtol=1e-4, atol=1e-5):
            switched_off.switch_off("triton", f"a kernel gives wrong numbers on {device}")
    except Exception as error:  # as in `attempt`
        if is_out_of_memory(error):
            raise
        switched_off.switch_off("triton", f"{type(error).__name__}: {error}")
    _probed.add(device)
