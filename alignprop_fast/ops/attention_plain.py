"""attention in plain PyTorch: correct and slow, for devices without a fused kernel and as the fallback.

    P = softmax(s q k^T)        o = P v        dv = P^T g
    dP = g v^T        dS = s P (dP - sum_j P dP)        dq = dS k        dk = dS^T q

It takes some queries at a time, so that at most `LOGITS_BYTES` of logits are alive. Sums are fp32 or wider, in a fixed
order. The backward pass computes P again from q and k, so it can follow the forward pass of any implementation.
"""

from collections.abc import Iterator

import torch

Tensor = torch.Tensor
LOGITS_BYTES = 2**28


def is_key(lengths: Tensor, keys: int) -> Tensor:
    """True for the first `lengths` [B] of some keys, False for padding: [B, 1, 1, N]."""
    return (torch.arange(keys, device=lengths.device) < lengths[:, None])[:, None, None]


def is_marks(padding: Tensor | None) -> bool:
    """Whether what tells padding apart is `marks` [B, N] and not `lengths` [B]."""
    return padding is not None and padding.ndim == 2


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(o [B, H, M, D], lse [B, H, M] in fp32 or wider) of q [B, H, M, D] and k, v [B, H, N, D].

    padding: lengths [B], or marks [B, N] where M = N.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(wide), v.to(wide)
    o, lse = _like_rows(q, q.dtype), q.new_empty(q.shape[:-1], dtype=wide)
    for rows in _pieces(q, k):
        logits = _logits(q[:, :, rows].to(wide), keys, scale, padding, rows)
        lse[:, :, rows] = logits.logsumexp(-1)
        o[:, :, rows] = (logits.softmax(-1) @ values).to(o.dtype)
    return o, lse


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient g of o; o and lse are not read."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(wide), v.to(wide)
    dq, dk, dv = _like_rows(q, q.dtype), _like_rows(k, wide).zero_(), _like_rows(v, wide).zero_()
    for rows in _pieces(q, k):
        queries, gradients = q[:, :, rows].to(wide), g[:, :, rows].to(wide)
        weights = _logits(queries, keys, scale, padding, rows).softmax(-1)
        d_weights = gradients @ values.mT
        d_logits = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
        dq[:, :, rows] = (d_logits @ keys).to(dq.dtype)
        dk += d_logits.mT @ queries
        dv += weights.mT @ gradients
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _logits(q: Tensor, k: Tensor, scale: float, padding: Tensor | None, rows: slice) -> Tensor:
    """Of the queries in these rows."""
    logits = scale * (q @ k.mT)
    if padding is None:
        return logits
    if is_marks(padding):
        return logits + padding[:, None, rows, None].to(logits.dtype) * padding[:, None, None]
    return logits.where(is_key(padding, k.shape[2]), -torch.inf)


def _pieces(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Ranges of queries whose logits take at most `LOGITS_BYTES`, or of one query each."""
    b, h, m, _ = q.shape
    step = max(1, LOGITS_BYTES // max(1, 4 * b * h * k.shape[2]))
    return (slice(start, start + step) for start in range(0, m, step))


def _like_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, H, M, D] over [B, M, H, D] memory, the layout of the projections around it."""
    b, h, m, d = t.shape
    return t.new_empty((b, m, h, d), dtype=dtype).transpose(1, 2)
