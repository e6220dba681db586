"""Runs the blocks of a diffusers image decoder by bands of rows, inside a `with` block.

A residual block becomes one op that keeps its input and computes itself again in its backward pass, so checkpointing it
too would be a waste. An upsampler keeps nothing. Values and gradients equal those of the whole image (see
ops.banded_conv).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignprop_fast.ops.banded_conv import NormConv, norm_conv, upsample_conv
from alignprop_fast.ops.banded_residual import banded_residual

Forward = Callable[..., torch.Tensor]


def bandable(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a decoder that `banded` takes: its residual blocks and upsamplers, and the decoder itself."""
    return [module for module in decoder.modules() if isinstance(module, tuple(BANDED))]


@contextmanager
def banded(modules: Sequence[nn.Module], rows: int | None = None) -> Iterator[None]:
    """Inside the `with` block each of the modules runs by bands of rows.

    A module is of a kind in `BANDED`. Of a decoder itself, the last norm, SiLU and convolution run by bands. A module
    that learns, runs under autocast or has an option that the ops do not cover is left unchanged. Names, parameters and
    hooks are not touched. The backward pass may run outside the `with` block; a forward pass that is repeated for it
    must run inside one again, as in `banded_stages`.

    Args:
        rows: height of a band in a block's output; None: 1/32 of its height, at least 16.

    Raises:
        TypeError: a module is of another kind.
    """
    with _with_forwards([pair for module in modules for pair in _forwards(module, rows)]):
        yield


@contextmanager
def banded_stages(decoder: Any, rows: int | None = None) -> Iterator[None]:
    """`banded`, with the middle block and each up block of the decoder checkpointed as a stage.

    This costs one more forward pass, and the backward pass holds the blocks of one stage at a time. The backward pass
    may run outside the `with` block.
    """
    modules, stages = bandable(decoder), [decoder.mid_block, *decoder.up_blocks]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), banded(modules, rows)

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    again = [(stage, partial(checkpoint, stage.forward, **options)) for stage in stages]
    with banded(modules, rows), _with_forwards(again):
        yield


@contextmanager
def _with_forwards(changed: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    found = [(module, module.__dict__.get("forward")) for module, _ in changed]
    for module, forward in changed:
        module.forward = forward
    try:
        yield
    finally:
        for module, own_forward in found:
            del module.forward
            if own_forward is not None:
                module.forward = own_forward


def _forwards(module: nn.Module, rows: int | None) -> list[tuple[nn.Module, Forward]]:
    """The modules to change for this one, each with its new forward."""
    for kind, forwards in BANDED.items():
        if isinstance(module, kind):
            return forwards(module, rows)
    raise TypeError(f"{type(module).__name__} cannot run by bands: leave it out")


def _of_residual(block: Any, rows: int | None) -> list[tuple[nn.Module, Forward]]:
    return [(block, partial(_residual, block, block.forward, rows))] if _is_plain_residual(block) else []


def _of_upsampler(layer: Any, rows: int | None) -> list[tuple[nn.Module, Forward]]:
    return [(layer, partial(_upsample, layer, layer.forward, rows))] if _is_plain_upsampler(layer) else []


def _of_decoder(decoder: Any, rows: int | None) -> list[tuple[nn.Module, Forward]]:
    norm, act, conv = decoder.conv_norm_out, decoder.conv_act, decoder.conv_out
    if not _is_plain_norm_conv(norm, act, conv):
        return []
    layer = _norm_conv(norm, conv)
    # The convolution does all three steps, so the other two modules return their input.
    return [(norm, pass_on), (act, pass_on), (conv, lambda x: norm_conv(x, layer, rows))]


def pass_on(x: torch.Tensor) -> torch.Tensor:
    return x


def _residual(
    block: ResnetBlock2D,
    own_forward: Forward,
    rows: int | None,
    input_tensor: torch.Tensor,
    temb: torch.Tensor | None = None,
) -> torch.Tensor:
    if temb is not None:
        return own_forward(input_tensor, temb)
    first, second = _norm_conv(block.norm1, block.conv1), _norm_conv(block.norm2, block.conv2)
    shortcut = None if block.conv_shortcut is None else (block.conv_shortcut.weight, block.conv_shortcut.bias)
    return banded_residual(input_tensor, first, second, shortcut, rows)


def _upsample(
    layer: Upsample2D,
    own_forward: Forward,
    rows: int | None,
    hidden_states: torch.Tensor,
    output_size: int | None = None,
) -> torch.Tensor:
    if output_size is not None:
        return own_forward(hidden_states, output_size)
    return upsample_conv(hidden_states, layer.conv.weight, layer.conv.bias, rows)


def _norm_conv(norm: nn.GroupNorm, conv: nn.Conv2d) -> NormConv:
    return NormConv(norm.num_groups, norm.weight, norm.bias, norm.eps, conv.weight, conv.bias)


def _is_plain_residual(block: ResnetBlock2D) -> bool:
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm != "scale_shift"
        and block.output_scale_factor == 1
        and not (block.dropout.training and block.dropout.p > 0)
        and block.conv1.out_channels == block.conv2.out_channels
        and _is_plain_norm_conv(block.norm1, block.nonlinearity, block.conv1)
        and _is_plain_norm_conv(block.norm2, block.nonlinearity, block.conv2)
        and (block.conv_shortcut is None or (not learns(block.conv_shortcut)))
    )


def _is_plain_upsampler(layer: Upsample2D) -> bool:
    conv = getattr(layer, "conv", None)
    return layer.norm is None and layer.interpolate and not layer.use_conv_transpose and _is_plain_conv(conv)


def _is_plain_norm_conv(norm: nn.Module, activation: nn.Module, conv: nn.Module) -> bool:
    return (
        isinstance(norm, nn.GroupNorm)
        and norm.affine
        and not learns(norm)
        and isinstance(activation, nn.SiLU)
        and _is_plain_conv(conv)
    )


def _is_plain_conv(conv: nn.Module | None) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.padding == conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not learns(conv)
    )


def learns(module: nn.Module) -> bool:
    """Whether weights learn or autocast applies, which casts inside an op's forward but not inside its backward."""
    device_type = next(module.parameters()).device.type
    autocasts = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return autocasts or any(p.requires_grad for p in module.parameters())


BANDED: dict[type[nn.Module], Callable[[Any, int | None], list[tuple[nn.Module, Forward]]]] = {
    ResnetBlock2D: _of_residual,
    Upsample2D: _of_upsampler,
    Decoder: _of_decoder,
}
"""What runs by bands: for a module of that class and the rows of a band, the modules to change and their new forwards.
Files of single models add theirs."""
