"""Cases for the ops with kernels, except attention: each at a real and a ragged shape, with and without options."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from alignprop_fast.doctor.checking import Case, Draw, Implementation, autograd_of, shape_text
from alignprop_fast.ops import (
    activation,
    backend,
    group_norm_silu,
    guided_step,
    layer_norm,
    lora_linear_triton,
    norm_modulate,
    qk_norm_rope,
)
from alignprop_fast.ops.lora_linear_plain import Layer, lora_linear_reference, plain_gradients, plain_outputs

Tensor = torch.Tensor
EPS = 1e-5
# Tokens and channels of most of SDXL's transformer blocks with guidance, or sizes that a CPU computes in a moment.
TOKENS = {True: (2, 1024), False: (2, 40)}
WIDTH = {True: 1280, False: 32}
RAGGED = (3, 29)


def kernel_cases(draw: Draw, large: bool, quick: bool) -> Iterator[Case]:
    """The ops that have kernels in this package.

    large: shapes of SDXL instead of small ones. quick: only one real and one ragged shape of each.
    """
    yield from _layer_norm(draw, large, quick)
    yield from _norm_modulate(draw, large)
    yield from _activation(draw, large)
    yield from _qk_norm_rope(draw, large)
    yield from _guided_step(draw, large)
    yield from _lora_linear(draw, large)
    yield from _group_norm_silu(draw, large, quick)


def _served(x: Tensor, op: str) -> tuple[str, str | None]:
    """(implementation, name that switches it off) of an op with a Triton kernel."""
    name = backend.backend(x, op)
    return name, f"{op}.triton" if name == "triton" else None


def _layer_norm(draw: Draw, large: bool, quick: bool) -> Iterator[Case]:
    real, ragged = (*TOKENS[large], WIDTH[large]), (*RAGGED, 130)
    # (shape, scale, shift, residual)
    kinds = [(real, True, True, True), (ragged, False, False, False)]
    if not quick:
        kinds += [(real, True, True, False), (ragged, True, False, True), (ragged, False, True, False)]
    for shape, scale, shift, residual in kinds:
        x = draw(*shape)
        gamma, beta = (draw(shape[-1]) if wanted else None for wanted in (scale, shift))
        frozen = [t for t in (gamma, beta) if t is not None]
        learning = [x, draw(*shape)] if residual else [x]
        implementation, off = _served(x, "norm_modulate")
        words = [word for word, there in (("scale", scale), ("shift", shift), ("residual", residual)) if there]
        yield Case(
            "layer_norm",
            f"{shape_text(shape)} {'+'.join(words) or 'plain'}",
            draw.dtype,
            implementation,
            (*learning, *frozen),
            len(learning),
            autograd_of(partial(_normed, layer_norm.layer_norm, scale, shift, residual), len(learning)),
            partial(_normed, _layer_norm_reference, scale, shift, residual),
            off,
        )


def _normed(norm: Any, scale: bool, shift: bool, residual: bool, x: Tensor, *rest: Tensor) -> Any:
    others = list(rest)
    added = others.pop(0) if residual else None
    gamma = others.pop(0) if scale else None
    beta = others.pop(0) if shift else None
    return norm(x, gamma, beta, EPS, added)


def _layer_norm_reference(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, residual: Tensor | None
) -> Any:
    total = x if residual is None else x + residual
    y = layer_norm.layer_norm_reference(total, gamma, beta, eps)
    return y if residual is None else (y, total)


def _norm_modulate(draw: Draw, large: bool) -> Iterator[Case]:
    real, ragged = (*TOKENS[large], WIDTH[large]), (*RAGGED, 130)
    # (shape, RMS norm of a branch that is added to the tokens, or adaLN after a gated branch)
    for shape, rms in ((real, False), (ragged, True)):
        x, other, weight = draw(*shape), draw(*shape), draw(shape[-1])
        modulations = tuple(draw(shape[0], 1, shape[-1]) for _ in range(3))
        implementation, off = _served(x, "norm_modulate")
        ours, reference = (
            partial(_modulated, fn, rms) for fn in (norm_modulate.norm_modulate, norm_modulate.norm_modulate_reference)
        )
        inputs = (x, other, weight, *modulations)
        name = f"{shape_text(shape)} {'RMS' if rms else 'adaLN'}"
        yield Case("norm_modulate", name, draw.dtype, implementation, inputs, 2, autograd_of(ours, 2), reference, off)


def _modulated(norm: Any, rms: bool, x: Tensor, other: Tensor, weight: Tensor, *modulations: Tensor) -> Any:
    scale, shift, gate = modulations
    if rms:
        return norm(x, scale, other, weight, EPS, one=0.0, rms=True)
    return norm(x, scale, shift, None, EPS, branch=other, gate=gate)


def _activation(draw: Draw, large: bool) -> Iterator[Case]:
    real, ragged = (*TOKENS[large], 8 * WIDTH[large]), (*RAGGED, 130)
    for name, shapes in {"geglu": [real, ragged], "swiglu": [ragged], "gelu_tanh": [ragged]}.items():
        for shape in shapes:
            x = draw(*shape)
            implementation, off = _served(x, "activation")
            run, reference = autograd_of(getattr(activation, name), 1), getattr(activation, f"{name}_reference")
            yield Case(name, shape_text(shape), draw.dtype, implementation, (x,), 1, run, reference, off)


def _qk_norm_rope(draw: Draw, large: bool) -> Iterator[Case]:
    # (tokens of each part, heads, head dimension, pairs from two halves)
    for lengths, heads, head_dim, halved in (((77, 1024) if large else (3, 40), 10, 64, False), ((29,), 3, 40, True)):
        shapes = [(2, length, heads * head_dim) for length in lengths for _ in range(3)]
        projections = [draw(*shape, std=2.0) for shape in shapes]
        scales = [draw(head_dim) for _ in range(2)]
        turns = [draw(1, length, head_dim // 2, dtype=torch.float32) for length in lengths]
        angles = [t for turn in turns for t in (turn.cos(), turn.sin())]
        inputs = (*projections, *scales, *angles)
        implementation, off = _served(projections[0], "qk_norm_rope")
        ours, reference = (
            partial(_prepared, fn, len(lengths), head_dim, halved)
            for fn in (qk_norm_rope.qk_norm_rope, qk_norm_rope.qk_norm_rope_reference)
        )
        name = f"2x{'+'.join(map(str, lengths))}x{heads}x{head_dim}{' halved' if halved else ''}"
        run = autograd_of(ours, len(shapes))
        yield Case("qk_norm_rope", name, draw.dtype, implementation, inputs, len(shapes), run, reference, off)


def _prepared(op: Any, count: int, head_dim: int, halved: bool, *tensors: Tensor) -> Any:
    """q, k and v of a sequence of some parts."""
    (q_scale, k_scale), angles = tensors[3 * count : 3 * count + 2], tensors[3 * count + 2 :]
    columns = (*(tensors[i : 3 * count : 3] for i in range(3)), angles[::2], angles[1::2])
    parts = [qk_norm_rope.Part(q, k, v, (q_scale, k_scale), (c, s)) for q, k, v, c, s in zip(*columns, strict=True)]
    return op(parts, head_dim, EPS, halved)


def _guided_step(draw: Draw, large: bool) -> Iterator[Case]:
    real, ragged = (2, 4, 128, 128) if large else (2, 4, 16, 16), (3, 4, 9, 7)
    # (shape of the latents, weights of the branches, noise)
    for shape, weights, noise in ((real, (-1.2, 1.5), True), (ragged, (0.8,), False)):
        x = draw(*shape, dtype=torch.float32)
        y = draw(len(weights) * shape[0], *shape[1:])
        z = (draw(*shape, dtype=torch.float32),) if noise else ()
        implementation, off = _served(x, "guided_step")
        name = f"{shape_text(shape)} {len(weights)} branches{' noise' if noise else ''}"
        run = autograd_of(partial(_step, guided_step.guided_step, weights), 0)
        reference = partial(_step, guided_step.guided_step_reference, weights)
        yield Case("guided_step", name, draw.dtype, implementation, (x, *z, y), 0, run, reference, off)
        adjoint = partial(_adjoint, guided_step.guided_step_adjoint, weights, y.dtype)
        reference = partial(_adjoint, guided_step.guided_step_adjoint_reference, weights, y.dtype)
        inputs = (draw(*shape, dtype=torch.float32),)
        run = autograd_of(adjoint, 0)
        yield Case("guided_step adjoint", name, draw.dtype, implementation, inputs, 0, run, reference, off)


def _step(step: Any, weights: tuple[float, ...], x: Tensor, *rest: Tensor) -> Tensor:
    *noise, y = rest
    return step(x, y, noise[0] if noise else None, 0.9, weights, 0.3 if noise else 0.0)


def _adjoint(adjoint: Any, weights: tuple[float, ...], y_dtype: torch.dtype, g: Tensor) -> Any:
    return adjoint(g, 0.9, weights, torch.float64 if g.dtype is torch.float64 else y_dtype)


def _lora_linear(draw: Draw, large: bool) -> Iterator[Case]:
    real, ragged = (*TOKENS[large], WIDTH[large]), (*RAGGED, 130)
    # (shape of x, outputs of each layer, rank); adapters in fp32, the default in training.
    for shape, outs, rank in ((real, (WIDTH[large],) * 3, 16), (ragged, (72,), 5)):
        width = shape[-1]
        sizes = [pair for out in outs for pair in ((rank, width), (out, rank))]
        adapters = [draw(*pair, std=pair[1] ** -0.5, dtype=torch.float32) for pair in sizes]
        frozen = [t for out in outs for t in (draw(out, width, std=width**-0.5), draw(out))]
        inputs = (draw(*shape), *adapters, *frozen)
        runs: dict[str, Implementation] = {"plain": partial(_lora_plain, len(outs))}
        implementation, off = _served(inputs[0], "lora_linear")
        if implementation == "triton":
            runs["triton"] = partial(_lora_triton, len(outs))
        for name, run in runs.items():
            yield Case(
                "lora_linear",
                f"{shape_text(shape)} to {'+'.join(map(str, outs))} rank {rank}",
                draw.dtype,
                name,
                inputs,
                1 + len(adapters),
                run,
                partial(_lora_reference, len(outs)),
                off if name == "triton" else None,
            )


def _layers(count: int, tensors: Sequence[Tensor]) -> list[Layer]:
    adapters, frozen = tensors[: 2 * count], tensors[2 * count :]
    pairs = [(adapters[2 * p : 2 * p + 2], frozen[2 * p : 2 * p + 2]) for p in range(count)]
    return [Layer(weight, bias, down, up, 0.7) for (down, up), (weight, bias) in pairs]


def _lora_reference(count: int, x: Tensor, *tensors: Tensor) -> Any:
    layers: list[Any] = [*_layers(count, tensors)]
    return tuple(lora_linear_reference(x, *layer) for layer in layers)


def _lora_plain(count: int, inputs: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    x, *tensors = inputs
    layers = _layers(count, tensors)
    return _in_order(plain_outputs(x, layers), *plain_gradients(gs, x, layers, True))


def _lora_triton(count: int, inputs: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    x, *tensors = inputs
    layers = _layers(count, tensors)
    ys = lora_linear_triton.prepared_forward(x, layers)(x, layers)
    return _in_order(ys, *lora_linear_triton.run_backward(gs, x, layers, True))


def _in_order(
    ys: Sequence[Tensor], dx: Tensor | None, d_downs: Sequence[Tensor | None], d_ups: Sequence[Tensor | None]
) -> list[Tensor]:
    """Outputs, the gradient of x, and those of A and B layer by layer."""
    assert dx is not None
    found = [*ys, dx, *(grad for pair in zip(d_downs, d_ups, strict=True) for grad in pair)]
    return [grad for grad in found if grad is not None]


def _group_norm_silu(draw: Draw, large: bool, quick: bool) -> Iterator[Case]:
    real, ragged = ((2, 320, 128, 128), 32) if large else ((1, 64, 24, 24), 32), ((1, 96, 33, 17), 3)
    # (shape, groups, SiLU, time embedding)
    kinds = [(*real, True, True), (*ragged, False, False)]
    if not quick:
        kinds += [(*real, True, False), (*ragged, False, True)]
    for shape, groups, silu, timed in kinds:
        x = (draw(*shape) * 3 + 1).to(memory_format=torch.channels_last)
        learning = (x, draw(*shape[:2])) if timed else (x,)
        inputs = (*learning, draw(shape[1]), draw(shape[1]))
        name = group_norm_silu.backend(x)
        words = f"{shape_text(shape)}{' silu' if silu else ''}{' time' if timed else ''}"
        ours = partial(_group_normed, group_norm_silu.group_norm_silu, groups, silu, timed)
        reference = partial(_group_normed, group_norm_silu.group_norm_silu_reference, groups, silu, timed)
        run, off = autograd_of(ours, len(learning)), "group_norm_silu.csrc" if name == "csrc" else None
        yield Case(
            "group_norm_silu", words, draw.dtype, name.partition(":")[0], inputs, len(learning), run, reference, off
        )


def _group_normed(op: Any, groups: int, silu: bool, timed: bool, x: Tensor, *rest: Tensor) -> Tensor:
    *time, gamma, beta = rest
    return op(x, groups, gamma, beta, EPS, silu=silu, addend_BC=time[0] if timed else None)
