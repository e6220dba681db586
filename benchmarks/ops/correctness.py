"""Whether the implementations of a `Problem` are right, in values and gradients."""

from __future__ import annotations

import torch

from benchmarks.ops.problem import Implementation, Problem, Tensor


def errors(problem: Problem) -> tuple[float, float]:
    """(largest error of "ours" over its bound, that error), over the outputs and all gradients.

    The bound is twice the error of "eager" in the same dtype, plus 1e-6. Errors are against "eager" in float64.
    """
    eager = problem.implementations["eager"]
    exact = _results(eager, [t.detach().double() for t in problem.inputs], problem.learning, problem.inputs[0].dtype)
    ours, plain = (
        _results(fn, [t.detach() for t in problem.inputs], problem.learning, problem.inputs[0].dtype)
        for fn in (problem.implementations["ours"], eager)
    )
    worst = (0.0, 0.0)
    for a, b, c in zip(ours, plain, exact, strict=True):
        error, allowed = (float((t.double() - c).abs().max()) for t in (a, b))
        ratio = error / (2 * allowed + 1e-6)
        # NaN must win.
        worst = worst if ratio <= worst[0] else (ratio, error)
    return worst


def wrong_at_size(problem: Problem) -> dict[str, str]:
    """By name, implementations whose results at the timed shape differ from "eager" by more than rounding.

    A kernel that is right on small tensors may skip rows of large ones. Both round in different orders, so sixteen
    times the dtype's epsilon of the largest number is accepted. Results of another shape are a peer's own form and
    pass.
    """
    dtype = problem.inputs[0].dtype
    eager = _results(problem.implementations["eager"], _leaves(problem, "eager"), problem.learning, dtype)
    wrong: dict[str, str] = {}
    for name, fn in problem.implementations.items():
        try:
            found = _results(fn, _leaves(problem, name), problem.learning, dtype)
        except Exception:  # its row will say why
            continue
        for i, (ours, theirs) in enumerate(zip(found, eager, strict=False)):
            if ours.shape != theirs.shape:
                continue
            error, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
            if not error <= 16 * torch.finfo(dtype).eps * largest + 1e-6:
                wrong[name] = f"result {i} is off by {error:.2g}, of {largest:.2g}"
    return wrong


def _leaves(problem: Problem, name: str) -> list[Tensor]:
    return [t.detach() for t in problem.inputs_of(name)]


def _results(fn: Implementation, inputs: list[Tensor], learning: int, rounded_to: torch.dtype) -> list[Tensor]:
    leaves = [t.requires_grad_(i < learning) for i, t in enumerate(inputs)]
    y = fn(*leaves)
    outputs = list(y) if isinstance(y, tuple) else [y]
    if not learning:
        return outputs
    gradients = gradients_of(outputs, rounded_to)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves[:learning], gradients)]


def gradients_of(outputs: list[Tensor], rounded_to: torch.dtype) -> list[Tensor]:
    """The same numbers for every implementation and dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    draws = [torch.randn(o.shape, generator=generator, device=o.device) for o in outputs]
    return [draw.to(rounded_to).to(o.dtype) for draw, o in zip(draws, outputs, strict=True)]
