"""Puts the frozen-aware ops into a diffusers model, and takes them out again.

A module changes its class for a subclass with the same parameters and another forward: names, state dict, adapters,
isinstance checks and copies stay what they were. Where an op does not apply (weights that learn, autocast, an unusual
option) the module's own forward runs.
"""

from collections.abc import Callable

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from alignprop_fast.ops.frozen_conv2d import frozen_conv2d
from alignprop_fast.ops.geglu import geglu
from alignprop_fast.ops.group_norm_silu import group_norm_silu


def _applies(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Frozen weights and no autocast, which would cast inside the op's forward but not inside its backward."""
    learning = any(p.requires_grad for module in modules for p in module.parameters(recurse=False))
    return not learning and not torch.is_autocast_enabled(x.device.type)


class FrozenConv2d(nn.Conv2d):
    """`nn.Conv2d` that keeps nothing of its input while its weights are frozen."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or not _applies(input, self):
            return super().forward(input)
        return frozen_conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class LeanGEGLU(GEGLU):
    """`diffusers` GEGLU that keeps its projection alone."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(hidden_states.device.type):
            return super().forward(hidden_states)
        return geglu(self.proj(hidden_states))


class LeanResnetBlock2D(ResnetBlock2D):
    """`diffusers` ResnetBlock2D with norm and SiLU as one op, in whatever memory format its input has."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        plain = self.upsample is None and self.downsample is None and self.time_embedding_norm == "default"
        if (
            not plain
            or not isinstance(self.nonlinearity, nn.SiLU)
            or not _applies(input_tensor, self.norm1, self.norm2)
        ):
            return super().forward(input_tensor, temb)
        h = self.conv1(_norm_silu(self.norm1, input_tensor))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if temb is not None:
            h = h + temb
        h = self.conv2(self.dropout(_norm_silu(self.norm2, h)))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return shortcut + h if self.output_scale_factor == 1 else (shortcut + h) / self.output_scale_factor


def _norm_silu(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


_LEAN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FrozenConv2d,
    GEGLU: LeanGEGLU,
    ResnetBlock2D: LeanResnetBlock2D,
}
_STOCK = {lean: stock for stock, lean in _LEAN.items()}


def put_ops_in(root: nn.Module) -> None:
    """Give every module below root that has a frozen-aware op that op. Doing it twice changes nothing."""
    _swap(root, _LEAN.get)


def take_ops_out(root: nn.Module) -> None:
    """Undo `put_ops_in`."""
    _swap(root, _STOCK.get)


def _swap(root: nn.Module, other: Callable[[type[nn.Module]], type[nn.Module] | None]) -> None:
    for module in root.modules():
        # The exact class: a subclass with a forward of its own is not ours to replace.
        if (swapped := other(type(module))) is not None:
            module.__class__ = swapped
