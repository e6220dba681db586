"""Trials of attention's implementations on a shape: first correct results, then the time.

Each trial has two sets of tensors: random ones, and ones whose logits are all near -110. There the logsumexp is below
-88.7, so exp(-logsumexp) overflows in fp32. Kernels that include a padded key gave NaN gradients there, but not on
random data (pytorch #196678, cudnn-frontend #628).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from alignprop_fast.ops.autotune import difference

Tensor = torch.Tensor
Tensors = tuple[torch.Tensor, ...]

_LOW = -110.0
# Enough heads to detect a wrong one, few enough to take at most a second in float64; and the scores alive at once.
_MOST_HEADS, _MOST_SCORES = 16, 2**23


class Backend(Protocol):
    """See `attention_backends`."""

    @property
    def forward(self) -> Callable[..., Tensors]: ...

    @property
    def backward(self) -> Callable[..., Tensors]: ...


class Case:
    """q, g [B, H, M, D] and k, v [B, H, N, D] in the memory layout of projections, [B, M, H, D].

    Args:
        q, k: tensors of the shape, dtype and device in question; their values are not read.
        low: whether all logits are near -110.
        padded: whether keys end in padding, half of them or less.
    """

    def __init__(self, q: Tensor, k: Tensor, low: bool, padded: bool = False):
        (b, h), n = q.shape[:2], k.shape[2]
        # Another length for each batch element.
        self.lengths = [n - (i + 1) * n // (2 * b) for i in range(b) for _ in range(h)] if padded else [n] * b * h
        self.padding = (torch.tensor(self.lengths[::h], dtype=torch.int32, device=q.device),) if padded else ()
        self.low, self.scale = low, q.shape[-1] ** -0.5
        # A separate generator, because a trial must not change the program's random numbers.
        generator = torch.Generator(q.device).manual_seed(0)
        self.q, self.g, self.k, self.v = (
            torch.randn(t.transpose(1, 2).shape, generator=generator, dtype=t.dtype, device=t.device).transpose(1, 2)
            for t in (q, q, k, k)
        )
        if low:
            self.q[..., 0] = (-_LOW / self.scale) ** 0.5
            self.k[..., 0] = -((-_LOW / self.scale) ** 0.5)

    @cached_property
    def expected(self) -> tuple[Tensors, Tensors]:
        """(o, lse, dq, dk, dv) of some heads [P, ...] by the plain expression, in this dtype and in float64."""
        q, k, v, g = (self.some_heads(t) for t in (self.q, self.k, self.v, self.g))
        lengths = [self.lengths[i] for i in self._heads()]
        exact = plain(q.double(), k.double(), v.double(), g.double(), self.scale, lengths)
        return plain(q, k, v, g, self.scale, lengths), exact

    def some_heads(self, t: Tensor) -> Tensor:
        """[P, ...] of [B, H, ...]: the first head, the last, and others at even distances."""
        return torch.stack([t[i // t.shape[1], i % t.shape[1]] for i in self._heads()])

    def _heads(self) -> list[int]:
        count = len(self.lengths)
        return torch.linspace(0, count - 1, min(count, _MOST_HEADS)).long().tolist()

    def fault(self, found: Tensors, first: int) -> str | None:
        """The fault of results, which correspond to `expected` from number `first` on; None if there is none."""
        inexact, exact = (tensors[first : first + len(found)] for tensors in self.expected)
        # The random tensors test rounding. Low logits enlarge the rounding of every order of summation.
        ratio = difference([self.some_heads(t) for t in found], inexact, exact, relative=0.01 if self.low else 0.0)
        if ratio <= 1:
            return None
        return f"errors are {ratio:.3g} times what is allowed{' where all logits are near -110' if self.low else ''}"


def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, lengths: Sequence[int]) -> Tensors:
    """(o, lse, dq, dk, dv) of softmax(scale q k^T) v, like autograd's, in the tensors' dtype.

    q, g: [P, M, D]; k, v: [P, N, D]; lse: [P, M]; lengths: valid keys of each head. It goes by heads and rows, so that
    few scores are alive at once.
    """
    return tuple(torch.stack(t) for t in zip(*map(_plain_head, q, k, v, g, [scale] * len(q), lengths), strict=True))


def _plain_head(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, length: int) -> Tensors:
    wide = torch.promote_types(q.dtype, torch.float32)
    all_dk, all_dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    k, v, dk, dv = (t[:length] for t in (k, v, all_dk, all_dv))
    rows: list[Tensors] = []
    count = max(1, _MOST_SCORES // len(k))
    for q_rows, g_rows in zip(q.split(count), g.split(count), strict=True):
        scores = scale * (q_rows @ k.T)
        weights = scores.softmax(-1)
        d_weights = g_rows @ v.T
        d_scores = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
        rows.append((weights @ v, scores.logsumexp(-1), d_scores @ k))
        dk += d_scores.T @ q_rows
        dv += weights.T @ g_rows
    return *(torch.cat(parts) for parts in zip(*rows, strict=True)), all_dk, all_dv


class Trials:
    """The data that the trials of one shape share, made on first use.

    Args:
        q, k: see `Case`.
        forward: the forward pass that a backward pass will follow.
        padded: see `Case`.
    """

    def __init__(self, q: Tensor, k: Tensor, forward: Callable[..., Tensors], padded: bool = False):
        self._q, self._k, self._forward, self._padded = q, k, forward, padded

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        return tuple(Case(self._q, self._k, low, self._padded) for low in (False, True))

    @cached_property
    def forwards(self) -> tuple[Tensors, ...]:
        """(o, lse) of each case."""
        return tuple(self._forward(case.q, case.k, case.v, case.scale, *case.padding) for case in self.cases)


@dataclass(frozen=True)
class ForwardTrial:
    """A candidate of `ops.autotune`: the forward pass of one backend."""

    backend: Backend
    trials: Trials

    def run(self) -> Tensors:
        return self._of(self.trials.cases[0])

    def fault(self) -> str | None:
        faults = (case.fault(self._of(case), first=0) for case in self.trials.cases)
        return next((fault for fault in faults if fault), None)

    def _of(self, case: Case) -> Tensors:
        return self.backend.forward(case.q, case.k, case.v, case.scale, *case.padding)


@dataclass(frozen=True)
class BackwardTrial:
    """The backward pass of one backend, after the forward pass that it will follow."""

    backend: Backend
    trials: Trials

    def run(self) -> Tensors:
        return self._of(self.trials.cases[0], self.trials.forwards[0], self.trials.cases[0].g)

    def fault(self) -> str | None:
        for case, forward in zip(self.trials.cases, self.trials.forwards, strict=True):
            # The gradient in the layout of an output projection, and as a contiguous tensor.
            for g, memory in ((case.g, "[B, M, H, D]"), (case.g.contiguous(), "[B, H, M, D]")):
                if fault := case.fault(self._of(case, forward, g), first=2):
                    return f"{fault}, with g in the memory of {memory}"
        return None

    def _of(self, case: Case, forward: Tensors, g: Tensor) -> Tensors:
        o, lse = forward
        return self.backend.backward(g, case.q, case.k, case.v, o, lse, case.scale, *case.padding)
