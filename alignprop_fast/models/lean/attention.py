"""Attention of diffusers' transformer blocks with this package's ops: one processor for each kind of block.

Queries, keys and values that read the same tokens are projected at once. The attention keeps these projections, o and
the logsumexp for the backward pass. Norms of q and k and rotary positions belong to it (`ops.qk_norm_rope`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn

from alignprop_fast.models.lean.text_projections import TextProjections, known_projections
from alignprop_fast.ops.attention import attention, attention_of_parts
from alignprop_fast.ops.lora_linear import lora_linears
from alignprop_fast.ops.qk_norm_rope import Part
from alignprop_fast.ops.reuse import Kind


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast would apply to x; it casts inside an op's forward but not inside its backward."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


class LeanAttnProcessor(AttnProcessor2_0):
    """`diffusers` attention of a transformer block; keeps q, k, v, o and the logsumexp."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None or autocasts(hidden_states):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is None:
            q, k, v = projected(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            (q,), (k, v) = projected(hidden_states, attn.to_q), _keys_and_values(attn, encoder_hidden_states)
        o_BHMD = attention(_heads(q, attn.heads), _heads(k, attn.heads), _heads(v, attn.heads), attn.scale)
        return attn.to_out[1](attn.to_out[0](o_BHMD.transpose(1, 2).flatten(2)))


class LeanImageAttnProcessor(AttnProcessor2_0):
    """`diffusers` attention over the pixels of an image, as in decoders; keeps q, k, v, o and the logsumexp."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plain = hidden_states.ndim == 4 and encoder_hidden_states is None and attention_mask is None
        if not plain or autocasts(hidden_states):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        x_BNC = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)
        q, k, v = (_heads(t, attn.heads) for t in projected(x_BNC, attn.to_q, attn.to_k, attn.to_v))
        o_BNC = attention(q, k, v).transpose(1, 2).flatten(2)
        y_BNC = attn.to_out[1](attn.to_out[0](o_BNC))
        return hidden_states + y_BNC.transpose(1, 2).reshape(hidden_states.shape)


class LeanJointAttnProcessor(JointAttnProcessor2_0):
    """`diffusers` attention of SD3: image tokens, followed by text tokens if there are any, in one attention."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        text = encoder_hidden_states
        norms = head_norms(attn, text is not None)
        if norms is None or autocasts(hidden_states):
            return super().__call__(attn, hidden_states, text, attention_mask)
        parts = projected_parts(attn, norms, hidden_states, text)
        o = attention_of_parts(parts, parts[0].q.shape[2] // attn.heads, norms.eps)
        if text is None:
            return attn.to_out[1](attn.to_out[0](o))
        o, text = o.split([hidden_states.shape[1], text.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](o)), text if attn.context_pre_only else attn.to_add_out(text)


class LeanFluxAttnProcessor(FluxAttnProcessor):
    """`diffusers` attention of FLUX with rotary positions: text tokens, then image tokens; or both in one stream.

    A mask [B, S] has the marks of `attention_of_parts` (Chroma).
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        text = encoder_hidden_states
        norms = head_norms(attn, text is not None)
        served = attention_mask is None or (attention_mask.ndim == 2 and attention_mask.is_floating_point())
        if norms is None or not served or autocasts(hidden_states) or attn.fused_projections:
            return super().__call__(attn, hidden_states, text, of_pairs(attention_mask), image_rotary_emb)
        o = rotary_attention(attn, norms, hidden_states, text, image_rotary_emb, attention_mask)
        if text is None:
            return o
        text, o = o.split([text.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](o)), attn.to_add_out(text)


def of_pairs(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of tokens [B, S] as one of pairs [B, 1, S, S]; any other as it is."""
    return mask if mask is None or mask.ndim != 2 else mask[:, None, :, None] * mask[:, None, None]


class HeadNorms(NamedTuple):
    """Frozen RMSNorms of heads: the scales of q and k, those of the text's, and their epsilon. No scales: no norm."""

    image: tuple[torch.Tensor, torch.Tensor] | None
    text: tuple[torch.Tensor, torch.Tensor] | None
    eps: float


def head_norms(attn: Any, with_text: bool) -> HeadNorms | None:
    """The norms of an attention's q and k, if the op serves them; else None, as for norms that learn."""
    norms = [attn.norm_q, attn.norm_k, *([attn.norm_added_q, attn.norm_added_k] if with_text else [])]
    if all(norm is None for norm in norms):
        return HeadNorms(None, None, 0.0)
    if not all(map(_is_served, norms)) or len({norm.eps for norm in norms}) > 1:
        return None
    q, k, *added = (norm.weight for norm in norms)
    return HeadNorms((q, k), (added[0], added[1]) if added else None, norms[0].eps)


def _is_served(norm: nn.Module | None) -> bool:
    if not isinstance(norm, nn.RMSNorm | RMSNorm) or norm.weight is None or norm.weight.requires_grad:
        return False
    return norm.eps is not None and not (isinstance(norm, RMSNorm) and norm.bias is not None)


def projected_parts(attn: Any, norms: HeadNorms, image: torch.Tensor, text: torch.Tensor | None) -> list[Part]:
    """The image tokens as a part of the sequence, and the text tokens as another."""
    q, k, v = projected(image, attn.to_q, attn.to_k, attn.to_v)
    parts = [Part(q, k, v, norms.image)]
    if text is not None:
        q, k, v = projected(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        parts.append(Part(q, k, v, norms.text))
    return parts


def rotary_attention(
    attn: Any,
    norms: HeadNorms,
    image: torch.Tensor,
    text: torch.Tensor | None,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    marks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention [B, N, C] over text tokens, then image tokens, whose q and k are normed and turned (FLUX.1 and 2)."""
    parts = turned(projected_parts(attn, norms, image, text)[::-1], angles)
    return attention_of_parts(parts, parts[0].q.shape[2] // attn.heads, norms.eps, marks=marks)


def turned(parts: Sequence[Part], angles: tuple[torch.Tensor, torch.Tensor] | None) -> list[Part]:
    """The parts with their angles, from those of the sequence: cos and sin [N, D], the same for both of a pair."""
    if angles is None:
        return list(parts)
    lengths = [part.q.shape[1] for part in parts]
    cos, sin = (t[None, :, ::2].split(lengths, dim=1) for t in angles)
    return [part._replace(angles=pair) for part, pair in zip(parts, zip(cos, sin, strict=True), strict=True)]


def projected(x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
    """Each layer's result on x; computed together if all layers are adapters that the op serves."""
    layers = _layers(x, linears)
    return tuple(linear(x) for linear in linears) if layers is None else lora_linears(x, layers, "qkv")


def _layers(x: torch.Tensor, linears: Sequence[nn.Module]) -> list[Any] | None:
    """The layers of the op on x; None unless all of these are adapters that the op serves."""
    as_layer: list[Any] = [getattr(linear, "as_layer", None) for linear in linears]
    layers = [None if method is None else method(x) for method in as_layer]
    return None if any(layer is None for layer in layers) else layers


def _keys_and_values(attn: Attention, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values of a text. With gradient, kept ones stand in for the product, and the op is recorded as usual."""
    known = known_projections(attn, text)
    if known is not None and not torch.is_grad_enabled():
        return known
    layers = None if known is None else _layers(text, (attn.to_k, attn.to_v))
    if layers is None:
        return projected(text, attn.to_k, attn.to_v)
    return lora_linears(text, layers, "qkv", known)


@torch.inference_mode(False)
@torch.no_grad()
def project_text(root: nn.Module, text: torch.Tensor) -> TextProjections:
    """The keys and values of the text in every attention below root that projects it as it is."""
    changes = getattr(root, "encoder_hid_proj", None) is not None  # the UNet has a layer for the text of its own
    served = [] if changes or autocasts(text) else over_a_text(root)
    return TextProjections(text, {attn: projected(text, attn.to_k, attn.to_v) for attn in served})


def _heads(x_BNC: torch.Tensor, heads: int) -> torch.Tensor:
    return x_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)


def is_plain(attn: nn.Module) -> bool:
    """Whether this is a transformer block's attention, with nothing before or after its projections."""
    processor: Any = getattr(attn, "processor", None)
    if issubclass(type(processor), tuple(DISPATCHED)):
        return getattr(processor, "_attention_backend", None) is None
    if not isinstance(attn, Attention):
        return False
    norms = [attn.spatial_norm, attn.group_norm, attn.norm_cross]
    if not isinstance(processor, JointAttnProcessor2_0):
        norms += [attn.norm_q, attn.norm_k]
    return all(norm is None for norm in norms) and not attn.residual_connection and attn.rescale_output_factor == 1


def over_a_text(root: nn.Module) -> list[Any]:
    """The plain attentions below root whose keys and values are projections of a text, the same in every step."""
    return [module for module in root.modules() if isinstance(module, Attention) and _is_over_a_text(module)]


def _is_over_a_text(attn: Attention) -> bool:
    return attn.is_cross_attention and type(attn.processor) is LeanAttnProcessor


Product = Kind | Literal["last"]
"""A kind of product; "last": the block's last, after which nothing but sums follow."""


def kept_linears(attn: Any) -> Iterator[tuple[nn.Module, Product]]:
    """The linear layers of a plain attention whose results a recomputed block may keep, with their kind."""
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_gate", "to_qkv_mlp_proj"):
        if getattr(attn, name, None) is not None:
            yield getattr(attn, name), "qkv"
    out = getattr(attn, "to_out", None)  # in FLUX.1's single-stream blocks it belongs to the block
    if out is not None:
        yield (out[0], "out") if isinstance(out, nn.ModuleList) else (out, "last")
    if getattr(attn, "to_add_out", None) is not None:
        yield attn.to_add_out, "out"


def is_over_an_image(attn: nn.Module) -> bool:
    """Whether this is attention with a group norm before it and its input added to its result, and nothing else."""
    return (
        isinstance(attn, Attention)
        and isinstance(attn.group_norm, nn.GroupNorm)
        and all(norm is None for norm in (attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross))
        and attn.residual_connection
        and attn.rescale_output_factor == 1
    )


_LEAN: dict[type, type] = {
    AttnProcessor2_0: LeanAttnProcessor,
    JointAttnProcessor2_0: LeanJointAttnProcessor,
}
DISPATCHED: dict[Any, type] = {FluxAttnProcessor: LeanFluxAttnProcessor}
"""Processors that are made for one model, in most of which users can choose another backend. Files of single models add
theirs."""
_LEAN_OVER_AN_IMAGE: dict[type, type] = {AttnProcessor2_0: LeanImageAttnProcessor}


def put_processors_in(root: nn.Module) -> None:
    """Give every attention below root its processor from this module, if there is one."""
    modules: list[Any] = list(root.modules())
    for attn in modules:
        plain = {**_LEAN, **DISPATCHED}
        lean = plain if is_plain(attn) else _LEAN_OVER_AN_IMAGE if is_over_an_image(attn) else {}
        if lean and type(attn.processor) in lean:
            attn.set_processor(lean[type(attn.processor)]())


def take_processors_out(root: nn.Module) -> None:
    """Undo `put_processors_in`."""
    pairs = (*_LEAN.items(), *DISPATCHED.items(), *_LEAN_OVER_AN_IMAGE.items())
    stock = {lean: own for own, lean in pairs}
    modules: list[Any] = list(root.modules())
    for attn in modules:
        if type(getattr(attn, "processor", None)) in stock:
            attn.set_processor(stock[type(attn.processor)]())
