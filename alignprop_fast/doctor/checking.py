"""Checks one implementation against its reference: errors of outputs and gradients, finite numbers, same bits twice.

For each result the accepted error is twice that of the plain expression in the same dtype, plus 1e-6. Both errors are
measured against that expression in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from alignprop_fast.doctor.report import Check
from alignprop_fast.ops import switched_off
from alignprop_fast.ops.errors import is_out_of_memory

Tensor = torch.Tensor
Implementation = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""(inputs, gradients of the outputs) -> outputs, then the gradients of the first inputs."""


class DeviceLost(RuntimeError):
    """The device no longer responds: a kernel broke its context, and this process cannot repair it."""


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    inputs: the first `learning` get gradients. outputs: how many results are outputs.
    run: the implementation; reference: the plain expression, which also runs on the inputs in float64.
    off: the name that switches `implementation` off; None if nothing could replace it.
    coarse: also accept an error of this share of the largest number, if `reference` does not measure rounding.
    """

    op: str
    name: str
    dtype: torch.dtype
    implementation: str
    inputs: tuple[Tensor, ...]
    learning: int
    run: Implementation
    reference: Callable[..., Any]
    off: str | None = None
    coarse: float = 0.0


class Draw:
    """Normal numbers that are the same on every device, from a separate generator."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * std).to(self.device, dtype or self.dtype)


def shape_text(shape: Sequence[int]) -> str:
    """A shape in a case's name, such as 2x1024x320."""
    return "x".join(map(str, shape))


def autograd_of(fn: Callable[..., Any], learning: int) -> Implementation:
    """An implementation from a function of tensors with its own backward pass."""
    return partial(_by_autograd, fn, learning)


def _by_autograd(fn: Callable[..., Any], learning: int, inputs: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(i < learning) for i, x in enumerate(inputs)]
    with torch.enable_grad():
        outputs = as_list(fn(*leaves))
    if not learning:
        return outputs
    gs = [g.to(output.dtype) for g, output in zip(gs, outputs, strict=True)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves[:learning], gs)]


def as_list(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, tuple | list) else [results]


def check(case: Case) -> Check:
    """Run the case; an implementation that is wrong is switched off.

    Raises:
        DeviceLost: the device no longer responds.
    """
    row = Check(case.op, case.implementation, case.name, dtype_name(case.dtype))
    device, reference = case.inputs[0].device, autograd_of(case.reference, case.learning)
    try:
        with torch.no_grad():
            outputs = as_list(case.reference(*case.inputs))
        draw = Draw(torch.float32, device)
        gs = [draw(*y.shape).to(y.dtype) for y in outputs]
        plain = reference(case.inputs, gs)
        exact = reference([x.double() for x in case.inputs], [g.double() for g in gs])
    except Exception as error:  # PyTorch itself fails, and nothing can replace it
        return failed(replace(row, implementation="plain PyTorch"), error, device, None)
    try:
        ours, again = (case.run(case.inputs, gs) for _ in range(2))
        row = compared(row, ours, plain, exact, again, len(outputs), case.coarse)
    except Exception as error:  # finding what kernels, compilers and libraries raise is the purpose here
        row = failed(row, error, device, case.off)
    return settled(row, case.off)


def failed(row: Check, error: Exception, device: torch.device, off: str | None) -> Check:
    """The row after an exception.

    Raises:
        DeviceLost: the device no longer responds; `off` is switched off.
    """
    if not answers(device):
        lost = f"the GPU is lost after {row.op} ({row.implementation}, {row.case}, {row.dtype}): {_line(error)}"
        if off is not None:
            switched_off.switch_off(off, lost)
        raise DeviceLost(lost) from error
    if is_out_of_memory(error):
        return replace(row, note="not examined: the device's memory is full")
    return replace(row, fault=_line(error))


def answers(device: torch.device) -> bool:
    """Whether the device still computes; after one illegal access of a kernel, a CUDA context never does."""
    try:
        return torch.ones(1, device=device).add_(1).item() == 2
    except Exception as error:
        return is_out_of_memory(error)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def settled(row: Check, off: str | None) -> Check:
    """The row. Its implementation is switched off if it is wrong, or noted as off if it was switched off meanwhile."""
    if row.fault is not None and off is not None:
        switched_off.switch_off(off, f"{row.case} {row.dtype}: {row.fault}")
    if row.fault is None and row.deterministic is False and torch.are_deterministic_algorithms_enabled() and off:
        row = replace(row, fault="two runs differ, but deterministic algorithms are required")
        switched_off.switch_off(off, f"{row.case} {row.dtype}: {row.fault}")
    why = None if off is None else switched_off.reason(off)
    return row if why is None else replace(row, fault=row.fault or why, off=off)


def compared(
    row: Check,
    ours: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    again: Sequence[Tensor] | None,
    outputs: int,
    coarse: float = 0.0,
) -> Check:
    """The row with its errors and its fault, if any; waits for the device. coarse: see `Case`."""
    same = None if again is None else all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    worst = (-1.0, 0.0)
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        where = f"output {i}" if i < outputs else f"gradient {i - outputs}"
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return replace(row, fault=f"{where} is {_kind(a)} instead of {_kind(b)}")
        if not torch.isfinite(a).all():
            return replace(row, fault=f"NaN or infinity in {where}")
        error, allowed = (float((t.double() - c).abs().max()) for t in (a, b))
        bound = max(2 * allowed + 1e-6, coarse * float(c.abs().max()))
        if not error <= bound:  # also true if the bound is NaN
            row = replace(row, fault=f"error {error:.2g} in {where}, accepted is {bound:.2g}")
        worst = max(worst, (error / bound, error))
    return replace(row, error=worst[1], error_over_bound=worst[0], deterministic=same)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(x: Tensor) -> str:
    return f"{dtype_name(x.dtype)} {tuple(x.shape)}"
