"""Attention, forward and backward (Dao et al. 2022; Dao 2023), deterministic.

Forward, per head, with s the scale and i, j the indices of query and key:

    S = s q k^T        lse_i = ln sum_j exp S_ij        o = exp(S - lse) v

Backward, for the gradient g of o, with P = exp(S - lse) computed again:

    delta_i = sum_d g_id o_id        dS = P * (g v^T - delta)
    dq = s dS k        dk = s dS^T q        dv = P^T g

Shapes: q, o, g, dq [B, H, M, D], k, v, dk, dv [B, H, N, D], lse and delta [B, H, M] in fp32, lse the natural logarithm.
q, k, v, g and o may have any strides whose last is 1. Results are [B, H, M, D] over [B, M, H, D] memory.
Keys may end in padding: batch element b has lengths[b] valid keys. The others have P = 0, and dk = dv = 0.
The softmax and every sum are fp32. P and dS are rounded to the storage type before they enter a tensor core.

FLOPs per head, in units of 2 M N D: forward 2; backward 7 (3 for dq, 4 for dk and dv, as S and g v^T are made twice),
or 5 for few keys. Bytes per head, if each kernel reads every tensor once: forward 2 (M + N) D elements; backward
6 (M + N) D; and 4 bytes per query for each of lse and delta. When M and N are long, arithmetic is the bound.

`attention_general` serves any number of keys, padded or not. Half types with at most 128 keys, none of them padding,
take `attention_short`; its docstring names the head dimensions.

Where it loses: computing S twice costs 7 units. Kernels that add dq atomically need 5, but are not deterministic.
On Hopper it uses no bulk copies and no specialised warps, so cuDNN should be ahead at N >= 1024.
Head dimensions that are not a multiple of 8 load element by element. fp32 runs without tensor cores
and, by estimate, slower than PyTorch's efficient kernel. It stays because in it the interpreter checks the formulas
without rounding, and because it costs only a row of block sizes.
"""

from collections.abc import Callable

import torch

from alignprop_fast.kernels import attention_general, attention_short
from alignprop_fast.kernels.attention_tiles import MAX_HEAD_DIM, rows_first

# What runs on tensors of these layouts: checking and preparing them takes longer than an operator of PyTorch.
_forwards: dict[tuple, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {}
_backwards: dict[tuple, Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}


def attention_forward(
    q_BHMD: torch.Tensor,
    k_BHND: torch.Tensor,
    v_BHND: torch.Tensor,
    scale: float,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v.

    Args:
        q_BHMD: [B, H, M, D], D up to 160; k_BHND, v_BHND: [B, H, N, D]; one dtype of fp32, fp16, bf16; last stride 1.
        scale: factor of the logits, above 0.
        lengths: valid keys of each batch element, 1 to N, [B] in int32; None: N.

    Returns:
        o [B, H, M, D] over [B, M, H, D] memory, and lse [B, H, M] in fp32, the natural logarithm.

    Raises:
        ValueError: shapes, dtypes, strides or a scale other than these.
    """
    q, k, v = q_BHMD, k_BHND, v_BHND
    key = (q.device, scale, *map(_layout, (q, k, v, lengths)))
    run = _forwards.get(key)
    if run is None:
        _check(q, k, v, scale, lengths)
        few = lengths is None and attention_short.serves_forward(q, k)
        run = attention_short.Forward(q, k, v, scale) if few else attention_general.Forward(q, k, v, scale, lengths)
        _forwards[key] = run
    return run(q, k, v, lengths)


def attention_backward(
    g_BHMD: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_forward` for q, k and v.

    Args:
        g_BHMD: gradient of o, [B, H, M, D], any strides.
        q, k, v, scale, lengths: inputs of the forward pass. o, lse: its outputs, from this or any other implementation.

    Returns:
        dq [B, H, M, D] over [B, M, H, D] memory; dk and dv [B, H, N, D] over [B, N, H, D] memory.

    Raises:
        ValueError: as `attention_forward`.
    """
    g = g_BHMD.to(q.dtype)
    g, o = (t if t.stride(-1) == 1 else t.contiguous() for t in (g, o))
    key = (q.device, scale, *map(_layout, (g, q, k, v, o, lengths)))
    run = _backwards.get(key)
    if run is None:
        _check(q, k, v, scale, lengths)
        if k.shape[2] == 1:
            run = _of_one_key
        elif lengths is None and attention_short.serves_backward(q, k):
            run = attention_short.Backward(g, q, k, v, scale)
        else:
            run = attention_general.Backward(g, q, k, v, o, scale, lengths)
        _backwards[key] = run
    return run(g, q, k, v, o, lse.contiguous(), lengths)


def _of_one_key(
    g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With one key the softmax is 1 for any logits, so dq and dk are exactly zero."""
    return rows_first(q).zero_(), rows_first(k).zero_(), rows_first(v).copy_(g.sum(2, keepdim=True))


def _layout(t: torch.Tensor | None) -> tuple[torch.dtype, torch.Size, tuple[int, ...]] | None:
    """What a launch depends on, besides the device and the scale."""
    return None if t is None else (t.dtype, t.shape, t.stride())


def signatures() -> list[dict]:
    """Every kernel and configuration behind this module, to be compiled ahead of time."""
    return attention_general.signatures() + attention_short.signatures()


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, lengths: torch.Tensor | None) -> None:
    if not scale > 0:
        # The kernels take the maximum of q k^T before they scale it.
        raise ValueError(f"scale must be above 0, not {scale}")
    b, h, _, d = q.shape
    if k.shape != v.shape or k.shape[:2] != (b, h) or k.shape[3] != d:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if min(q.numel(), k.numel()) == 0 or d > MAX_HEAD_DIM:
        raise ValueError(f"needs M, N >= 1 and 1 <= D <= {MAX_HEAD_DIM}, not M {q.shape[2]}, N {k.shape[2]}, D {d}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q, k and v need one dtype of fp32, fp16, bf16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise ValueError("the last dimension of q, k and v must be contiguous; call .contiguous() on the others")
    if lengths is not None and (lengths.shape != (b,) or lengths.dtype != torch.int32 or not lengths.is_contiguous()):
        raise ValueError(f"lengths must be {b} contiguous numbers in int32, not {tuple(lengths.shape)} {lengths.dtype}")
