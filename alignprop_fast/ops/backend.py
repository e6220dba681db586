"""Chooses the implementation for a tensor, and falls back to plain PyTorch if it fails.

Triton compiles a kernel at its first launch. It needs a C compiler and a driver, which may be missing, and a GPU with
enough shared memory and registers. None of this may end a run: an implementation that fails is switched off for this
process, with one line, and the plain path takes over (`ops.switched_off`).
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Generic, TypeVar, TypeVarTuple

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor

from alignprop_fast.ops import switched_off
from alignprop_fast.ops.errors import is_out_of_memory

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

_HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_probed: set[torch.device] = set()


def backend(x: torch.Tensor, op: str) -> str:
    """ "triton" if the package's kernels of this op serve x, else "reference".

    They serve fp32, fp16 and bf16 on NVIDIA's GPUs if Triton is installed and works, which the first tensor on a device
    tests. Nothing is tested under torch.compile, with fake tensors, or while a CUDA graph is captured.
    """
    if not (x.is_cuda and x.dtype in _DTYPES and _HAS_TRITON and x.numel() > 0) or only_plain(x):
        return "reference"
    if x.device not in _probed and not is_traced(x):
        _probe(x.device)
    off = switched_off.reasons
    return "reference" if off and ("triton" in off or f"{op}.triton" in off) else "triton"


def is_traced(x: object) -> bool:
    """Whether x is a placeholder for a later tensor, so that nothing can run, be timed or fail."""
    return torch.compiler.is_compiling() or type(x) is FakeTensor


def only_plain(x: torch.Tensor) -> bool:
    """Whether only plain PyTorch serves x's device, which holds for all but the CPU and NVIDIA's GPUs; says so once.

    AMD's GPUs are called "cuda" too, but these kernels were not written for them and never compiled for one.
    """
    if x.is_cpu or x.is_meta or (x.is_cuda and torch.version.hip is None):
        return False
    if not is_traced(x):
        device = "AMD's GPUs" if x.is_cuda else x.device.type
        switched_off.switch_off("kernels", f"there are none for {device}, where plain PyTorch serves every op")
    return True


def attempt(
    name: str,
    first: Callable[[*Arguments], Result],
    plain: Callable[[*Arguments], Result],
    *arguments: *Arguments,
) -> Result:
    """first(*arguments); after its first failure in this process plain(*arguments), which returns the same.

    Not for traced tensors. A full device is not a failure of `first` and is raised. An error while a CUDA graph is
    captured is raised too, because the graph is lost. If `plain` also fails, the arguments are at fault.

    name: the name that is switched off after a failure.
    """
    if name in switched_off.reasons:
        return plain(*arguments)
    try:
        return first(*arguments)
    except Exception as error:  # compilers, drivers and libraries raise anything
        if is_out_of_memory(error) or _is_capturing():
            raise
        reason = f"{type(error).__name__}: {error}"
    # Outside the handler, whose traceback would keep the failed call's tensors alive.
    result = plain(*arguments)
    switched_off.switch_off(name, reason)
    return result


class Function(torch.autograd.Function):
    """An op's autograd function, with a shorter way in.

    PyTorch's `apply` first searches the arguments for what functorch's transforms left in them, which takes as long as
    an aten operator. These ops serve no such transform, so this is the one behind it. torch.compile knows `apply` by
    its name and never runs it.
    """

    apply = torch._C._FunctionBase.__dict__["apply"]


class Launch(Generic[*Arguments, Result]):
    """Launches an op's kernels: by a direct call, or as a custom operator where torch.compile or fake tensors trace it.

    A call through the operator costs several times the host time of a direct one.

    Attributes:
        operator: the custom operator, alignprop_fast::`name`.

    Args:
        op: its name in `switched_off`.
        kernel: launches the kernels. Of several results, those that a call does not have are None.
        plain: takes over if the kernels fail (`attempt`).
        fake: the results for fake tensors, empty tensors instead of None; its annotations are the operator's.
    """

    def __init__(
        self,
        name: str,
        op: str,
        kernel: Callable[[*Arguments], Result],
        plain: Callable[[*Arguments], Result],
        fake: Callable[[*Arguments], Any],
    ):
        self._name, self._kernel, self._plain = f"{op}.triton", kernel, plain
        schema = torch.library.infer_schema(fake, mutates_args=())
        name = f"alignprop_fast::{name}"
        self.operator: Any = torch.library.custom_op(name, self._filled, mutates_args=(), schema=schema)
        self.operator.register_fake(fake)

    def __call__(self, *arguments: *Arguments) -> Result:
        first: Any = arguments[0]  # type: ignore[misc]  # mypy: the tuple may be empty
        if is_traced(first[0] if isinstance(first, list) else first):
            return self.operator(*arguments)
        return attempt(self._name, self._kernel, self._plain, *arguments)

    def _filled(self, *arguments: *Arguments) -> Any:
        """As the operator, whose results are all tensors."""
        results = attempt(self._name, self._kernel, self._plain, *arguments)
        if not isinstance(results, tuple):
            return results
        return tuple(results[0].new_empty(0) if result is None else result for result in results)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _probe(device: torch.device) -> None:
    """Launch a small kernel and compare the result; if Triton fails on this device, switch it off."""
    if _is_capturing():
        return
    try:
        from alignprop_fast.kernels import activation

        v = torch.linspace(-2, 2, 512, device=device).view(2, 256)
        # Allows fp32 rounding; a kernel that did not run, or ran elsewhere, is off by the values themselves.
        if not torch.allclose(activation.activation_forward(v, None, "gelu"), F.gelu(v), rtol=1e-4, atol=1e-5):
            switched_off.switch_off("triton", f"a kernel gives wrong numbers on {device}")
    except Exception as error:  # as in `attempt`
        if is_out_of_memory(error):
            raise
        switched_off.switch_off("triton", f"{type(error).__name__}: {error}")
    _probed.add(device)
