"""Checks attention: every forward pass with every backward pass of the implementations on a device.

Inputs are like those in training: q, k and v in the layout of the projections, [B, N, H, D] in memory; the gradient in
that layout and as a contiguous [B, H, M, D]. In one case all logits are near -100. Their exponentials underflow if a
kernel does not subtract the maximum, which random numbers do not reveal. In this case an error of a hundredth of the
largest number is accepted too. The reason: fp32 resolves such a logit to 4e-6, and all kernels compute probabilities
again from the logsumexp, so each probability has that error. The plain expression does not have it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from alignprop_fast.doctor.checking import Draw, compared, dtype_name, failed, settled
from alignprop_fast.doctor.report import Check
from alignprop_fast.ops import attention_backends
from alignprop_fast.ops.attention_backends import Backend

Tensor = torch.Tensor
_REFUSED = "cannot run: "


@dataclass(frozen=True)
class Sizes:
    """q [B, H, M, D] and k, v [B, H, N, D]. low: all logits near -100."""

    b: int
    h: int
    m: int
    n: int
    d: int
    low: bool = False

    def __str__(self) -> str:
        return f"B{self.b} H{self.h} M{self.m} N{self.n} D{self.d}{' logits near -100' if self.low else ''}"


# Text; SD 1.5 at 768 x 768; SDXL's image tokens; SD3's image tokens with its text tokens. Long sequences have one head,
# because the reference holds all probabilities in float64.
LARGE = (
    Sizes(2, 10, 4096, 77, 64),
    Sizes(2, 8, 576, 576, 80),
    Sizes(1, 2, 4096, 4096, 64),
    Sizes(1, 2, 4429, 4429, 64),
    Sizes(2, 2, 576, 576, 64, low=True),
    Sizes(2, 2, 576, 77, 64, low=True),
)
SMALL = (
    Sizes(1, 2, 40, 77, 40),
    Sizes(1, 1, 33, 576, 64),
    Sizes(1, 1, 32, 4096, 64),
    Sizes(1, 1, 33, 4429, 64),
    Sizes(1, 1, 32, 77, 64, low=True),
)


@dataclass(frozen=True)
class _Problem:
    """Inputs of one case, and the reference results in float64 and in the dtype."""

    qkv: tuple[Tensor, Tensor, Tensor]
    gs: dict[str, Tensor]
    exact: list[Tensor]
    plain: list[Tensor]
    exact_lse: Tensor
    plain_lse: Tensor
    scale: float
    coarse: float


def check_attention(draw: Draw, all_sizes: Sequence[Sizes]) -> Iterator[Check]:
    """A row for each forward pass and for each pair, at each size. Implementations that are wrong are switched off.

    Raises:
        DeviceLost: the device no longer responds.
    """
    with _strictly():
        for sizes in all_sizes:
            yield from _check_sizes(draw, sizes)


@contextmanager
def _strictly() -> Iterator[None]:
    """Flash and memory-efficient attention are deterministic only if torch's flag is not set to warn only."""
    on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warns)


def _check_sizes(draw: Draw, sizes: Sizes) -> Iterator[Check]:
    row = Check("attention", "plain PyTorch", str(sizes), dtype_name(draw.dtype))
    try:
        problem = _problem(draw, sizes)
    except Exception as error:  # usually too large for this device
        yield failed(row, error, draw.device, None)
        return
    for forward in attention_backends.offered("forward", *problem.qkv[:2]):
        outputs, result = _forward(replace(row, implementation=forward.name), forward, problem)
        yield result
        if outputs is None:
            continue
        for backward in attention_backends.offered("backward", *problem.qkv[:2]):
            for layout, g in problem.gs.items():
                pair = replace(row, implementation=f"{forward.name} > {backward.name}", case=f"{sizes}, {layout}")
                yield _backward(pair, backward, problem, g, outputs)


def without_those_that_never_run(rows: Sequence[Check]) -> list[Check]:
    """The rows. Implementations that raised in every case are switched off; raising in some cases is allowed."""
    served = {_name(row) for row in rows if row.fault is None and row.note is None}
    result = []
    for row in rows:
        if row.note is not None and row.note.startswith(_REFUSED) and _name(row) not in served:
            row = settled(replace(row, fault=row.note, note=None), _name(row))
        result.append(row)
    return result


def _name(row: Check) -> str | None:
    """The name that switches the row's pass off; None for plain PyTorch, which replaces all others."""
    forward, pair, backward = row.implementation.partition(" > ")
    name, direction = (backward, "backward") if pair else (forward, "forward")
    return None if name == attention_backends.PLAIN.name else f"attention.{name}.{direction}"


def _problem(draw: Draw, sizes: Sizes) -> _Problem:
    b, h, d, scale = sizes.b, sizes.h, sizes.d, sizes.d**-0.5
    q, k, v, g = (draw(b, rows, h, d) for rows in (sizes.m, sizes.n, sizes.n, sizes.m))
    if sizes.low:  # q and k point in opposite directions, with noise of one logit
        along = (100 / scale / d) ** 0.5
        q, k = q * 0.1 + along, k * 0.1 - along
    q, k, v, g = (t.transpose(1, 2) for t in (q, k, v, g))
    layouts = {"g as q": g, "g contiguous": g.contiguous()}
    exact, exact_lse = formula(q.double(), k.double(), v.double(), g.double(), scale)
    plain, plain_lse = formula(q, k, v, g, scale)
    return _Problem((q, k, v), layouts, exact, plain, exact_lse, plain_lse, scale, 0.01 if sizes.low else 0.0)


def formula(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> tuple[list[Tensor], Tensor]:
    """([o, dq, dk, dv], logsumexp) by plain operators, in the dtype of q.

    `attention_reference` is no use here: on a GPU it calls one of the kernels under examination.
    """
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        logits = scale * (leaves[0] @ leaves[1].mT)
        o = torch.softmax(logits, dim=-1) @ leaves[2]
    lse = torch.logsumexp(logits.detach(), -1)
    return [o.detach(), *torch.autograd.grad(o, leaves, g)], lse


def _forward(row: Check, backend: Backend, problem: _Problem) -> tuple[tuple[Tensor, Tensor] | None, Check]:
    """((o, logsumexp), row); the former is None if the results are wrong."""
    try:
        (o, lse), (o2, lse2) = (backend.forward(*problem.qkv, problem.scale) for _ in range(2))
        plain, exact = [problem.plain[0], problem.plain_lse.float()], [problem.exact[0], problem.exact_lse]
        row = compared(row, [o, lse.float()], plain, exact, [o2, lse2.float()], 2, problem.coarse)
    except Exception as error:  # as each library likes
        return None, _refused(row, error, problem)
    row = settled(row, _name(row))
    return None if row.fault else (o, lse), row


def _backward(row: Check, backend: Backend, problem: _Problem, g: Tensor, outputs: tuple[Tensor, Tensor]) -> Check:
    try:
        ours, again = (list(backend.backward(g, *problem.qkv, *outputs, problem.scale)) for _ in range(2))
        row = compared(row, ours, problem.plain[1:], problem.exact[1:], again, 0, problem.coarse)
    except Exception as error:  # as each library likes
        return _refused(row, error, problem)
    return settled(row, _name(row))


def _refused(row: Check, error: Exception, problem: _Problem) -> Check:
    """The note for a library that raises, because it may not support this case, as flash does not support fp32."""
    row = failed(row, error, problem.qkv[0].device, _name(row))
    return row if row.fault is None else replace(row, fault=None, note=f"{_REFUSED}{row.fault}")
