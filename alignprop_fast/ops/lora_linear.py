"""lora_linear: frozen linear layers with low-rank adapters, y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, eq. 3).

Up to three layers that read the same x (q, k, v) are one op. W and b never learn. With g_p the gradient of y_p and
u_p = s_p g_p B_p:

    dx = sum_p g_p W_p + u_p A_p        dA_p = u_p^T x        dB_p = s_p g_p^T (x A_p^T)

It saves x and the weights once, in x's dtype: the adapters are cast, not x. (PEFT casts x for adapters in fp32, and
saves a copy for each adapter.) x A^T is computed again, which costs R / O of the forward pass. On a GPU it uses the
package's kernels, or cuBLAS with additional small products, or (forward) cuBLAS with a kernel that adds the adapter,
whichever measured faster (`ops.autotune`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from alignprop_fast.kernels.lora_blocks import partial_sums
from alignprop_fast.ops import lora_linear_trials as trials
from alignprop_fast.ops import lora_linear_triton as fused
from alignprop_fast.ops.backend import Function, attempt
from alignprop_fast.ops.lora_linear_plain import Layer, plain_gradients
from alignprop_fast.ops.reuse import Kind, reuse_or_compute
from alignprop_fast.ops.rounded_linear import RoundedLayer, exact_layers, is_rounding, rounded_outputs, run_rounded

Tensor = torch.Tensor


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        given: tuple[Sequence[Layer], Kind | None, tuple[Tensor, ...] | None],
        *adapters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """given: layers, keep and known; adapters: those of the layers, because autograd sees only arguments."""
        layers, keep, known = given
        # Without an adapter that learns, the gradient needs only the weights. They are not saved by autograd, because a
        # checkpointed block repeats all that comes before the last tensor that is.
        if True in ctx.needs_input_grad[2:]:
            ctx.save_for_backward(x, *adapters)
        ctx.layers = layers
        return reuse_or_compute(keep, _outputs, x, layers, known)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        # Of the adapters autograd has checked that nobody changed them since.
        saved = ctx.saved_tensors
        x: Any = saved[0] if saved else None
        layers, wants = ctx.layers, ctx.needs_input_grad
        learn = [(wants[2 + 2 * p], wants[3 + 2 * p]) for p in range(len(layers))]
        served = x is not None and all(map(all, learn))
        if not served or trials.backward(x, layers) == "plain":
            dx, d_downs, d_ups = plain_gradients(gs, x, layers, wants[0], learn)
            if served and x.is_meta:
                _count_partial_sums(x, layers)
        else:
            dx, d_downs, d_ups = attempt(fused.NAME, fused.run_backward, plain_gradients, gs, x, layers, wants[0])
        return dx, None, *[grad for pair in zip(d_downs, d_ups, strict=True) for grad in pair]


def _count_partial_sums(x: Tensor, layers: Sequence[Layer]) -> None:
    """Allocate for a moment what the kernels' partial sums take: plans without a GPU count memory on meta tensors."""
    if trials.serves(layers) and x.dtype != torch.float64:
        shapes = trials.problem("backward", x, layers)
        _, chunks, sizes = partial_sums(shapes.tokens, shapes.n_in, shapes.outs, shapes.ranks, shapes.dtype)
        torch.empty(chunks, sum(sizes), dtype=torch.float32, device=x.device)


def _outputs(x: Tensor, layers: Sequence[Layer], known: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if known is not None:  # as new tensors, because other calls return the same ones
        return tuple(y.detach() for y in known)
    return trials.forward(x, layers)(x, layers)


def lora_linears(
    x: Tensor,
    layers: Sequence[Layer | RoundedLayer],
    keep: Kind | None = None,
    known: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """One to three layers of the same input, differentiable in x and the adapters unless they are rounded.

    Args:
        x: [..., I], any strides.
        layers: weights and biases frozen and in x's dtype; adapters in any floating dtype, or None.
        keep: the kind of this result, for a recomputed segment (`ops.reuse`).
        known: the results, if they are known already: they take the place of the products.

    Returns:
        y [..., O] of each layer in x's dtype.
    """
    exact: Sequence[Any] = layers
    if is_rounding():
        if run_rounded(layers, x):
            return rounded_outputs(x, layers)
        exact = exact_layers(layers)
    if not torch.is_grad_enabled():
        return _outputs(x, exact, known)
    adapters: list[Any] = []
    for layer in exact:
        adapters += layer[2:4]
    return _LoraLinear.apply(x, (exact, keep, known), *adapters)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    keep: Kind | None = None,
) -> Tensor:
    """x weight^T + bias + scale (x down^T) up^T of one layer; see `lora_linears`."""
    return lora_linears(x, [Layer(weight, bias, down, up, scale)], keep)[0]
