"""The implementations that `attention` chooses from, each with one calling form.

    forward(q, k, v, scale) -> (o [B, H, M, D], lse [B, H, M]: natural logarithm, fp32 or wider)
    backward(g, q, k, v, o, lse, scale) -> (dq, dk, dv)

One form of the logsumexp lets the backward pass of one follow the forward pass of another, so each direction takes what
is fastest on this GPU at this shape: cuDNN and flash trade places by GPU, and for short keys neither fills the chip in
the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch._subclasses import FakeTensor

from alignprop_fast.ops import attention_plain, attention_triton
from alignprop_fast.ops.backend import only_plain
from alignprop_fast.ops.choice import fastest

Tensor = torch.Tensor
Tensors = tuple[torch.Tensor, ...]
aten = torch.ops.aten


@dataclass(frozen=True)
class Backend:
    """One implementation of attention, in both directions."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, float], Tensors]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensors]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def _cpu_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, o, lse, 0.0, False, scale=scale)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _flash_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    return aten._scaled_dot_product_flash_attention_backward(
        *(g, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *_no_dropout(q)), scale=scale
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    return o, lse.view(q.shape[:-1])


def _cudnn_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(g, q, k, v, o, lse[..., None], *_no_dropout(q), None, None, None, q.shape[2], k.shape[2], 0.0, False),
        scale=scale,
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    o, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    # Its rows are padded to a multiple of 32.
    return o, lse[..., : q.shape[2]].contiguous()


def _efficient_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        *(g, q, k, v, None, o, padded, *_no_dropout(q), 0.0, wanted, False), scale=scale
    )[:3]


def _no_dropout(q: Tensor) -> Tensors:
    """The seed and offset that the fused kernels ask for and, without dropout, never read."""
    return torch.zeros((), dtype=torch.int64, device=q.device), torch.zeros((), dtype=torch.int64, device=q.device)


@cache
def _cuda_backends() -> dict[str, Backend]:
    found = [
        Backend("cudnn", _cudnn_forward, _cudnn_backward),
        Backend("flash", _flash_forward, _flash_backward),
        Backend("efficient", _efficient_forward, _efficient_backward),
        # Without Triton this one raises when it is tried, and is left out for that.
        Backend("triton", attention_triton.forward, attention_triton.backward),
    ]
    return {backend.name: backend for backend in found}


CPU = Backend("cpu", _cpu_forward, _cpu_backward)
PLAIN = Backend("plain", attention_plain.forward, attention_plain.backward)


def choose(direction: str, q: Tensor, k: Tensor) -> Backend:
    """The implementation for q [B, H, M, D] and k [B, H, N, D]; on a GPU measured once per shape (`ops.choice`).

    direction: "forward" or "backward".
    """
    if only_plain(q):
        return PLAIN
    if not q.is_cuda:
        return CPU
    backends = _cuda_backends()
    if isinstance(q, FakeTensor):
        # Traced, not run: there is nothing to time.
        return next(iter(backends.values()))
    return backends[fastest(_problem(direction, q, k), lambda: _candidates(direction, q, k), q.device)]


def explain(direction: str, q: Tensor, k: Tensor) -> str:
    """Which implementation serves this shape and direction, and the times it was chosen by."""
    from alignprop_fast.ops import choice

    name = choose(direction, q, k).name
    if name == PLAIN.name:
        return f"attention {direction} on {q.device}: plain PyTorch, slow, since no fused kernel is known to serve it"
    if not q.is_cuda:
        return f"attention {direction} on {q.device.type}: {name}, PyTorch's fused kernel"
    return f"attention {direction}: {name}; {choice.explain(_problem(direction, q, k), q.device)}"


def _problem(direction: str, q: Tensor, k: Tensor) -> str:
    b, h, m, d = q.shape
    return f"attention {direction} {str(q.dtype).removeprefix('torch.')} B{b} H{h} M{m} N{k.shape[2]} D{d}"


def _candidates(direction: str, q: Tensor, k: Tensor) -> dict[str, Callable[[], object]]:
    """Every implementation on random tensors of this shape; one that cannot serve it raises when called."""
    b, h, m, d = q.shape
    q_BMHD = torch.randn(b, m, h, d, dtype=q.dtype, device=q.device)
    k_BNHD, v_BNHD = torch.randn(2, b, k.shape[2], h, d, dtype=q.dtype, device=q.device)
    query, key, value = (t.transpose(1, 2) for t in (q_BMHD, k_BNHD, v_BNHD))
    scale = d**-0.5

    def forward(backend: Backend) -> Callable[[], object]:
        return lambda: backend.forward(query, key, value, scale)

    def backward(backend: Backend) -> Callable[[], object]:
        outputs: list[Tensors] = []

        def run() -> object:
            if not outputs:
                outputs.append(backend.forward(query, key, value, scale))
            o, lse = outputs[0]
            return backend.backward(query, query, key, value, o, lse, scale)

        return run

    return {name: (forward if direction == "forward" else backward)(b) for name, b in _cuda_backends().items()}
