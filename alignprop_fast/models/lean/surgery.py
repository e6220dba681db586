"""Puts the ops for frozen weights into a diffusers model, and takes them out again.

The class of a module is replaced by a subclass with the same parameters and another forward. So names, state dict,
adapters, isinstance checks and copies do not change. If an op does not apply (weights that learn, autocast, an unusual
option), the module's original forward runs. Attention gets another processor, as diffusers provides.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from alignprop_fast.models.lean.attention import (
    Product,
    autocasts,
    is_plain,
    kept_linears,
    put_processors_in,
    take_processors_out,
)
from alignprop_fast.ops.activation import geglu
from alignprop_fast.ops.frozen_conv2d import frozen_conv2d
from alignprop_fast.ops.group_norm_silu import backend as group_norm_backend
from alignprop_fast.ops.group_norm_silu import group_norm_silu
from alignprop_fast.ops.layer_norm import layer_norm
from alignprop_fast.ops.lora_linear import lora_linears
from alignprop_fast.ops.lora_linear_plain import Layer
from alignprop_fast.ops.reuse import Kind
from alignprop_fast.ops.rounded_linear import RoundedLayer, RoundedWeight, is_rounding


def applies(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Whether weights are frozen and autocast is off; it casts inside an op's forward but not inside its backward."""
    learning = any(p.requires_grad for module in modules for p in module.parameters(recurse=False))
    return not learning and not autocasts(x)


class FrozenConv2d(nn.Conv2d):
    """`nn.Conv2d` that does not keep its input while its weights are frozen."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._convolved(input, self.bias) if self._frozen(input) else super().forward(input)

    def before_norm(
        self, input: torch.Tensor, addend_BC: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The result, and what a group norm that follows must add to it: `addend_BC`, and the bias if it is left out.

        On a GPU a bias is a pass of its own over the result. The norm adds it for nothing if csrc/ serves it or if it
        has an addend anyway.
        """
        free = addend_BC is not None or group_norm_backend(input) == "csrc"
        if self.bias is None or not free or not self._frozen(input):
            return self(input), addend_BC
        bias_BC = self.bias[None]
        return self._convolved(input, None), bias_BC if addend_BC is None else addend_BC + bias_BC

    def _frozen(self, x: torch.Tensor) -> bool:
        return self.padding_mode == "zeros" and not isinstance(self.padding, str) and applies(x, self)

    def _convolved(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        stride, padding, dilation = self.stride, self.padding, self.dilation
        assert not isinstance(padding, str)
        return frozen_conv2d(x, self.weight, bias, stride, padding, dilation, self.groups)


class LeanLinear(nn.Linear):
    """`nn.Linear` whose result a recomputed segment may keep while its weights are frozen."""

    reused_as: Kind | None = None
    rounded: RoundedWeight | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not applies(input, self):
            return super().forward(input)
        return lora_linears(input, [self.product(Layer(self.weight, self.bias))], self.reused_as)[0]

    def product(self, layer: Layer) -> Layer | RoundedLayer:
        """The layer as products now use it: with the weight in 8 bits inside `rounding`, if there is one."""
        return layer if self.rounded is None or not is_rounding() else RoundedLayer(self.rounded, layer)


class Copied(NamedTuple):
    """What a LoRA layer computes with a copy of its adapter, while `active` is its setting (`adapter_copies`)."""

    active: object
    layer: Layer


class LeanLoraLinear(LoraLinear):
    """PEFT's LoRA layer as one op that keeps x only once and casts the adapters instead of x."""

    reused_as: Kind | None = None
    copied: Copied | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.as_layer(x)
        return super().forward(x) if layer is None else lora_linears(x, [layer], self.reused_as)[0]

    def as_layer(self, x: torch.Tensor) -> Layer | RoundedLayer | None:
        """The layer for the op on x, or None if PEFT's own path must run."""
        layer = self._with_adapters(x)
        return self.base_layer.product(layer) if layer and isinstance(self.base_layer, LeanLinear) else layer

    def _with_adapters(self, x: torch.Tensor) -> Layer | None:
        if self.copied is not None and self.copied.active is self._active_adapter:
            return self.copied.layer
        return None if autocasts(x) else self.adapted()

    def adapted(self) -> Layer | None:
        """The frozen layer with its active adapters as one; None if the op does not serve them."""
        base, names = self.base_layer, self.served_adapters()
        if not names:
            return None
        downs = [self.lora_A[name].weight for name in names]
        ups = [self.lora_B[name].weight for name in names]
        if len(names) == 1:
            return Layer(base.weight, base.bias, downs[0], ups[0], self.scaling[names[0]])
        # Several adapters together form one whose rank is the sum.
        up = torch.cat([up * self.scaling[name] for name, up in zip(names, ups, strict=True)], dim=1)
        return Layer(base.weight, base.bias, torch.cat(downs), up)

    def served_adapters(self) -> list[str]:
        """The active adapters, if the op serves them; none if PEFT's path must, as for DoRA and dropout."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = (
            not self.disable_adapters
            and not self.merged
            and isinstance(self.base_layer, nn.Linear)
            and not any(p.requires_grad for p in self.base_layer.parameters(recurse=False))
            and not any(name in self.lora_variant or self.lora_bias[name] for name in names)
            and not any(self.lora_dropout[name].training and _rate(self.lora_dropout[name]) > 0 for name in names)
        )
        return names if plain else []


def _rate(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


class LeanGEGLU(GEGLU):
    """`diffusers` GEGLU that keeps only its projection."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if autocasts(hidden_states):
            return super().forward(hidden_states)
        return geglu(self.proj(hidden_states))


class LeanResnetBlock2D(ResnetBlock2D):
    """`diffusers` ResnetBlock2D with norm and SiLU as one op, which adds the bias of the convolution before it too."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        # "group" in decoders means the default norm without a time embedding.
        kind = "default" if self.time_embedding_norm == "group" and temb is None else self.time_embedding_norm
        if (
            kind != "default"
            or self.upsample is not None
            or self.downsample is not None
            or not isinstance(self.nonlinearity, nn.SiLU)
            or not applies(input_tensor, self.norm1, self.norm2)
        ):
            return super().forward(input_tensor, temb)
        h = _norm_silu(self.norm1, input_tensor)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        # A convolution with adapters is another class.
        h, addend_BC = self.conv1.before_norm(h, temb) if type(self.conv1) is FrozenConv2d else (self.conv1(h), temb)
        h = self.conv2(self.dropout(_norm_silu(self.norm2, h, addend_BC)))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return shortcut + h if self.output_scale_factor == 1 else (shortcut + h) / self.output_scale_factor


def _norm_silu(norm: nn.GroupNorm, x: torch.Tensor, addend_BC: torch.Tensor | None = None) -> torch.Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, addend_BC=addend_BC)


class LeanGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that preserves channels_last while its weights are frozen."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.ndim != 4 or not self.affine or not applies(input, self):
            return super().forward(input)
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, silu=False)


class LeanLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension, while its weights are frozen."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if len(self.normalized_shape) != 1 or not applies(input, self):
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, self.eps)


class LeanTransformerBlock(BasicTransformerBlock):
    """`diffusers` BasicTransformerBlock that adds the attentions' branches in the same pass as the norms after them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        norms = (self.norm1, self.norm2, self.norm3) if self.norm_type == "layer_norm" else ()
        if (
            not (norms and all(isinstance(norm, LeanLayerNorm) for norm in norms) and applies(hidden_states, *norms))
            or self.only_cross_attention
            or self.pos_embed is not None
            or self._chunk_size is not None
            or cross_attention_kwargs
        ):
            return super().forward(
                *(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask),
                *(timestep, cross_attention_kwargs, class_labels, added_cond_kwargs),
            )
        branch = self.attn1(self.norm1(hidden_states), attention_mask=attention_mask)
        y, h = _added_and_normed(hidden_states, branch, self.norm2)
        branch = self.attn2(y, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        y, h = _added_and_normed(h, branch, self.norm3)
        return self.ff(y) + h


def _added_and_normed(x: torch.Tensor, branch: torch.Tensor, norm: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + branch), x + branch)."""
    return layer_norm(x, norm.weight, norm.bias, norm.eps, branch)


LEAN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FrozenConv2d,
    GEGLU: LeanGEGLU,
    ResnetBlock2D: LeanResnetBlock2D,
    LoraLinear: LeanLoraLinear,
    nn.GroupNorm: LeanGroupNorm,
    nn.LayerNorm: LeanLayerNorm,
    BasicTransformerBlock: LeanTransformerBlock,
}
"""The class that takes a stock class's place. Files of single models add theirs."""
KEPT: dict[type[nn.Module], Mapping[str, Product]] = {
    GEGLU: {"proj": "geglu"},
    GELU: {"proj": "geglu"},
    FluxSingleTransformerBlock: {"proj_mlp": "geglu", "proj_out": "last"},
}
"""Linear layers outside attention whose results a recomputed block may keep. Files of single models add theirs."""


def put_ops_in(root: nn.Module) -> None:
    """Put the ops into every module below root that has one. A second call changes nothing."""
    _swap(root, LEAN.get)
    for linear, kind in products_of(root):
        if type(linear) is nn.Linear:
            linear.__class__ = LeanLinear
        if isinstance(linear, LeanLinear | LeanLoraLinear):
            linear.reused_as = _reused_as(linear, kind)
    put_processors_in(root)


def _reused_as(linear: nn.Module, kind: Product) -> Kind | None:
    """The kind of result under which a recomputed block keeps this layer's.

    The last product of a block runs again only if an adapter has saved its input after it.
    """
    if kind != "last":
        return kind
    return "out" if isinstance(linear, LeanLoraLinear) else None


def take_ops_out(root: nn.Module) -> None:
    """Undo `put_ops_in`."""
    for module in root.modules():
        if isinstance(module, LeanLinear | LeanLoraLinear):
            vars(module).pop("reused_as", None)
            vars(module).pop("copied", None)
    take_processors_out(root)
    stock = {lean: own for own, lean in LEAN.items()} | {LeanLinear: nn.Linear}
    _swap(root, stock.get)


def products_of(root: nn.Module) -> Iterator[tuple[nn.Module, Product]]:
    """The linear layers whose results a recomputed transformer block may keep, with their kind."""
    for module in root.modules():
        if is_plain(module):
            yield from kept_linears(module)
        for layer, names in KEPT.items():
            if isinstance(module, layer):
                yield from ((module.get_submodule(name), kind) for name, kind in names.items())


def _swap(root: nn.Module, other: Callable[[type[nn.Module]], type[nn.Module] | None]) -> None:
    for module in root.modules():
        # The exact class, because a subclass may have a forward of its own.
        if (swapped := other(type(module))) is not None:
            module.__class__ = swapped
