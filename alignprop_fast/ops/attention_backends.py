"""The implementations that `attention` chooses from, all with the same signatures.

    forward(q, k, v, scale[, padding]) -> (o [B, H, M, D], lse [B, H, M]: natural logarithm, fp32 or wider)
    backward(g, q, k, v, o, lse, scale[, padding]) -> (dq, dk, dv)

padding is the number of valid keys of each batch element, lengths [B], or marks [B, N] (see `attention_of_parts`). It
goes only to those that take it; on a GPU, marks go to one alone.

All use the same form of the logsumexp, so the backward pass of one can follow the forward pass of another. Each
direction uses the fastest on this GPU at this shape: whether cuDNN or flash wins depends on the GPU, and with few keys
neither fills the chip in the backward pass. An implementation must first show correct results on the shape
(`attention_trials`). Under torch's flag for deterministic algorithms, flash (2, 3 and 4) and efficient have
deterministic backward passes, and cuDNN's is not used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from alignprop_fast.ops import attention_packages, attention_plain, attention_triton, autotune, switched_off
from alignprop_fast.ops.attention_plain import is_key, is_marks
from alignprop_fast.ops.attention_trials import BackwardTrial, ForwardTrial, Trials
from alignprop_fast.ops.autotune import fastest, remembered
from alignprop_fast.ops.backend import attempt, backend, is_traced, only_plain

Tensor = torch.Tensor
Tensors = tuple[torch.Tensor, ...]
aten = torch.ops.aten


@dataclass(frozen=True)
class Backend:
    """One implementation of attention, in both directions. pads: whether it takes lengths."""

    name: str
    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]
    pads: bool = False


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, padding: Tensor | None = None) -> Tensors:
    bias = _bias(q, k, padding)
    return torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)


def _cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, padding: Tensor | None = None
) -> Tensors:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        g, q, k, v, o, lse, 0.0, False, attn_mask=_bias(q, k, padding), scale=scale
    )


def _bias(q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor | None:
    """What is added to the logits: minus infinity for padded keys, [B, 1, 1, N], or one where both tokens are marked,
    [B, 1, N, N]. Rows start at multiples of 16 bytes, as kernels demand."""
    if padding is None:
        return None
    keys = k.shape[2]
    if is_marks(padding):
        marks = padding.to(q.dtype)
        return (marks[:, None, :, None] * F.pad(marks, (0, -keys % 16))[:, None, None])[..., :keys]
    bias = q.new_zeros(len(q), 1, 1, keys + -keys % 16)[..., :keys]
    return bias.masked_fill_(~is_key(padding, keys), -torch.inf)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    return torch._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _flash_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    return aten._scaled_dot_product_flash_attention_backward.default(
        *(g, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *_no_dropout(q)), scale=scale
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    o, lse = torch._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    return o, lse.view(q.shape[:-1])


def _cudnn_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    # cuDNN may use a plan that was built for another layout of g and o (pytorch #191576, #171627).
    g, o = _laid_out_like(q, g), _laid_out_like(q, o)
    return aten._scaled_dot_product_cudnn_attention_backward.default(
        *(g, q, k, v, o, lse[..., None], *_no_dropout(q), None, None, None, q.shape[2], k.shape[2], 0.0, False),
        scale=scale,
    )


def _laid_out_like(q: Tensor, t: Tensor) -> Tensor:
    """t [B, H, M, D] with the memory order of q's dimensions."""
    return t if t.stride() == q.stride() else torch.empty_like(q).copy_(t)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, padding: Tensor | None = None) -> Tensors:
    bias = _expanded(_bias(q, k, padding), q, k)
    o, lse = torch._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[:2]
    # The rows of its logsumexp are padded to a multiple of 32.
    return o, lse[..., : q.shape[2]].contiguous()


def _efficient_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, padding: Tensor | None = None
) -> Tensors:
    bias = _expanded(_bias(q, k, padding), q, k)
    padded = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward.default(
        *(g, q, k, v, bias, o, padded, *_no_dropout(q), 0.0, wanted, False), scale=scale
    )[:3]


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(*q.shape[:3], k.shape[2])


def _no_dropout(q: Tensor) -> Tensors:
    """The seed and offset that the fused kernels require but, without dropout, never read."""
    return torch.zeros((), dtype=torch.int64, device=q.device), torch.zeros((), dtype=torch.int64, device=q.device)


@cache
def _cuda_backends() -> dict[str, Backend]:
    """Those of a GPU that are installed."""
    missing = {one.name for module, one in _PACKAGES.items() if attention_packages.fault(module) is not None}
    return {name: one for name, one in _BACKENDS.items() if name not in missing}


CPU = Backend("cpu", _cpu_forward, _cpu_backward, pads=True)
PLAIN = Backend("plain", attention_plain.forward, attention_plain.backward, pads=True)
_PACKAGES = {
    attention_packages.FLASH3: Backend("flash3", attention_packages.flash3_forward, attention_packages.flash3_backward),
    attention_packages.FLASH4: Backend("flash4", attention_packages.flash4_forward, attention_packages.flash4_backward),
}
_BACKENDS = {
    one.name: one
    for one in (
        Backend("cudnn", _cudnn_forward, _cudnn_backward),
        Backend("flash", _flash_forward, _flash_backward),
        Backend("efficient", _efficient_forward, _efficient_backward, pads=True),
        Backend("triton", attention_triton.forward, attention_triton.backward, pads=True),
        *_PACKAGES.values(),
        PLAIN,
    )
}

_MARKED = "efficient"  # the one that takes marks

# PyTorch's own guards know GPUs and library versions on which a kernel is unavailable or wrong.
_GUARDS = {
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "flash": torch.backends.cuda.can_use_flash_attention,
    "efficient": torch.backends.cuda.can_use_efficient_attention,
}


def chosen(direction: str, q: Tensor, k: Tensor, padding: Tensor | None) -> Callable[..., Tensors]:
    """One direction of what `choose` names, for this padding, or plain PyTorch if it fails."""
    if is_traced(q):
        return getattr(_choose_for(direction, q, k, padding), direction)
    key = "attention", direction, q.dtype, q.shape, k.shape, None if padding is None else padding.ndim
    return remembered(key, _chosen, q.device, direction, q, k, padding)


def _chosen(direction: str, q: Tensor, k: Tensor, padding: Tensor | None) -> Callable[..., Tensors]:
    one = _choose_for(direction, q, k, padding)
    return partial(attempt, f"attention.{one.name}.{direction}", getattr(one, direction), getattr(PLAIN, direction))


def _choose_for(direction: str, q: Tensor, k: Tensor, padding: Tensor | None) -> Backend:
    if is_marks(padding) and q.is_cuda and not only_plain(q):
        return _BACKENDS[_MARKED]
    return choose(direction, q, k, padding is not None)


def choose(direction: str, q: Tensor, k: Tensor, padded: bool = False) -> Backend:
    """The implementation for q [B, H, M, D] and k [B, H, N, D]; on a GPU measured once per shape (`ops.autotune`).

    direction: "forward" or "backward". padded: whether keys have lengths.
    """
    if only_plain(q):
        return PLAIN
    return _choose_on_gpu(direction, q, k, padded) if q.is_cuda else CPU


def _choose_on_gpu(direction: str, q: Tensor, k: Tensor, padded: bool) -> Backend:
    # Traced code does not run, so nothing can be timed.
    if is_traced(q):
        return _BACKENDS[_untimed(q, padded)]
    return _BACKENDS[_fastest(direction, q, k, padded)]


def _fastest(direction: str, q: Tensor, k: Tensor, padded: bool) -> str:
    return fastest(_problem(direction, q, k, padded), _Candidates(direction, q, k, padded).trials(), q.device)


def explain(direction: str, q: Tensor, k: Tensor) -> str:
    """The implementation for this shape and direction, the measured times, and why others were not used."""
    name = choose(direction, q, k).name
    if name == PLAIN.name:
        return f"attention {direction} on {q.device}: plain PyTorch, slow, since no fused kernel is known to serve it"
    if not q.is_cuda:
        return f"attention {direction} on {q.device.type}: {name}, PyTorch's fused kernel"
    reasons = "".join(f", {name}: {reason}" for name, reason in _refused(direction, q, k).items())
    return f"attention {direction}: {name}; {autotune.explain(_problem(direction, q, k), q.device)}{reasons}"


def offered(direction: str, q: Tensor, k: Tensor, padded: bool = False) -> list[Backend]:
    """The implementations that may serve this shape, plain PyTorch last, without those that are off or refused."""
    if only_plain(q):
        return [PLAIN]
    if not q.is_cuda:
        return [PLAIN] if switched_off.reason(f"attention.{CPU.name}.{direction}") else [CPU, PLAIN]
    refused = _refused(direction, q, k, padded)
    return [one for name, one in _cuda_backends().items() if name not in refused]


def _problem(direction: str, q: Tensor, k: Tensor, padded: bool = False) -> str:
    """What the fastest implementation depends on: the key under which `ops.autotune` remembers the times."""
    b, h, m, d = q.shape
    dtype = str(q.dtype).removeprefix("torch.")
    return f"attention {direction} {dtype} B{b} H{h} M{m} N{k.shape[2]} D{d}{' padded' if padded else ''}"


def _untimed(q: Tensor, padded: bool) -> str:
    """An implementation that serves this dtype and head size without a trial."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return "flash" if half and q.shape[-1] <= 256 and not padded else "efficient"


def _refused(direction: str, q: Tensor, k: Tensor, padded: bool = False) -> dict[str, str]:
    """Implementations that are not tried on this shape, with the reason."""
    wants_gradient = direction == "backward"
    query, key = (t.detach().requires_grad_(wants_gradient) for t in (q, k))
    params = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, False, False)
    why = "PyTorch refuses it for this GPU, shape or version"
    found = {name: why for name, can_use in _GUARDS.items() if not can_use(params)}
    if wants_gradient and torch.are_deterministic_algorithms_enabled():
        found["cudnn"] = "its backward pass is not deterministic"
    if backend(q, "attention") != "triton":
        found["triton"] = switched_off.reason("triton") or "Triton does not serve it here"
    for name, one in _cuda_backends().items():
        if padded and not one.pads:
            found[name] = "it takes no lengths of keys"
        if reason := switched_off.reason(f"attention.{name}.{direction}"):
            found[name] = reason
    return found


@dataclass
class _Candidates:
    """Makes the trials of all implementations that may serve this shape."""

    direction: str
    q: Tensor
    k: Tensor
    padded: bool

    def trials(self) -> dict[str, ForwardTrial | BackwardTrial]:
        first = _untimed(self.q, self.padded)
        candidates = offered(self.direction, self.q, self.k, self.padded)
        in_order = sorted(candidates, key=lambda one: one.name != first)
        trials = Trials(self.q, self.k, self._forward, self.padded)
        trial = ForwardTrial if self.direction == "forward" else BackwardTrial
        return {one.name: trial(one, trials) for one in in_order}

    def _forward(self, q: Tensor, k: Tensor, *rest: Any) -> Tensors:
        return choose("forward", q, k, self.padded).forward(q, k, *rest)
