"""Cases for what PyTorch computes: the ops that consist of its operators, and those operators themselves."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from alignprop_fast.doctor.checking import Case, Draw, autograd_of, shape_text
from alignprop_fast.ops import banded_conv, banded_residual, frozen_conv2d

Tensor = torch.Tensor
EPS = 1e-5


def plain_cases(draw: Draw, large: bool) -> Iterator[Case]:
    """The ops that consist of PyTorch's operators."""
    yield from _frozen_conv2d(draw, large)
    yield from _banded(draw, large)


def _frozen_conv2d(draw: Draw, large: bool) -> Iterator[Case]:
    real, ragged = ((2, 320, 64, 64), 320) if large else ((1, 32, 16, 16), 32), ((1, 33, 17, 20), 20)
    for (shape, out), stride in ((real, 1), (ragged, 2)):
        inputs = (draw(*shape), draw(out, shape[1], 3, 3, std=(9 * shape[1]) ** -0.5), draw(out))
        geometry = ((stride, stride), (1, 1), (1, 1), 1)
        ours = partial(_convolved, frozen_conv2d.frozen_conv2d, geometry)
        reference = partial(_convolved, frozen_conv2d.frozen_conv2d_reference, geometry)
        name = f"{shape_text(shape)} to {out} stride {stride}"
        yield Case(
            "frozen_conv2d", name, draw.dtype, "aten", inputs, 1, autograd_of(ours, 1), reference, "frozen_conv2d"
        )


def _convolved(op: Any, geometry: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return op(x, weight, bias, *geometry)


def _banded(draw: Draw, large: bool) -> Iterator[Case]:
    real, ragged = (1, 128, 256, 256) if large else (1, 32, 24, 24), (1, 64, 37, 19)
    for shape, rows in ((real, None), (ragged, 5)):
        c, out = shape[1], shape[1] // 2
        x = draw(*shape)
        norms = (draw(c), draw(c), draw(out, c, 3, 3, std=(9 * c) ** -0.5), draw(out))
        seconds = (draw(out), draw(out), draw(out, out, 3, 3, std=(9 * out) ** -0.5), draw(out))
        shortcut = (draw(out, c, 1, 1, std=c**-0.5), draw(out))
        ops: list[tuple[str, str, tuple[Tensor, ...], Any, Any]] = [
            ("norm_conv", "banded_conv", norms, _norm_conv, _norm_conv_reference),
            ("upsample_conv", "banded_conv", norms[2:], _upsample_conv, banded_conv.upsample_conv_reference),
            ("banded_residual", "banded_residual", (*norms, *seconds, *shortcut), _residual, _residual_reference),
        ]
        for op, off, frozen, ours, reference in ops:
            run = autograd_of(partial(ours, rows), 1)
            words = f"{shape_text(shape)} rows {rows or 'auto'}"
            yield Case(op, words, draw.dtype, "aten", (x, *frozen), 1, run, reference, off)


def _layer(gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor) -> banded_conv.NormConv:
    return banded_conv.NormConv(16, gamma, beta, EPS, weight, bias)


def _norm_conv(rows: int | None, x: Tensor, *frozen: Tensor) -> Tensor:
    return banded_conv.norm_conv(x, _layer(*frozen), rows)


def _norm_conv_reference(x: Tensor, *frozen: Tensor) -> Tensor:
    return banded_conv.norm_conv_reference(x, _layer(*frozen))


def _upsample_conv(rows: int | None, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return banded_conv.upsample_conv(x, weight, bias, rows)


def _residual(rows: int | None, x: Tensor, *frozen: Tensor) -> Tensor:
    first, second, shortcut = _layer(*frozen[:4]), _layer(*frozen[4:8]), (frozen[8], frozen[9])
    return banded_residual.banded_residual(x, first, second, shortcut, rows)


def _residual_reference(x: Tensor, *frozen: Tensor) -> Tensor:
    first, second, shortcut = _layer(*frozen[:4]), _layer(*frozen[4:8]), (frozen[8], frozen[9])
    return banded_residual.banded_residual_reference(x, first, second, shortcut)


def pytorch_cases(draw: Draw) -> Iterator[Case]:
    """PyTorch itself on this device against the host; a broken operator is off by the size of the signal."""
    weight = draw(48, 160, std=160**-0.5)
    yield _against_host("matrix product", (draw(77, 160), weight), F.linear)
    yield _against_host("convolution", (draw(2, 16, 17, 9), draw(24, 16, 3, 3, std=1 / 12)), F.conv2d)
    yield _against_host("softmax", (draw(33, 130),), partial(torch.softmax, dim=-1))
    yield _against_host("layer norm", (draw(33, 130),), partial(F.layer_norm, normalized_shape=[130]))
    yield _against_host("group norm", (draw(2, 32, 9, 7),), partial(F.group_norm, num_groups=4))


def _against_host(name: str, inputs: tuple[Tensor, ...], fn: Any) -> Case:
    count, reference = len(inputs), partial(_on_host, fn)
    # bf16 rounds to 1/256, and TF32, which GPUs use for convolutions in fp32, to 1/2048.
    return Case("PyTorch", name, inputs[0].dtype, "aten", inputs, count, autograd_of(fn, count), reference, coarse=0.02)


def _on_host(fn: Any, *inputs: Tensor) -> Tensor:
    return fn(*(x.cpu() for x in inputs)).to(inputs[0].device)
