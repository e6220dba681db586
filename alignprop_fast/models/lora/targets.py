"""Which layers of a denoiser get adapters, by the names that PEFT matches."""

from __future__ import annotations

from typing import Any

TARGETS = ("attention", "attention+ff", "all")
"""attention: projections to queries, keys, values and output; attention+ff: also the feed-forward layers; all: also a
UNet's convolutions (a transformer has none)."""

_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
_JOINT = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_JOINT_FEED_FORWARD = (*_FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2")
# Residual blocks, up- and downsamplers ("conv"), and the projections around the transformer blocks, which are
# convolutions in some UNets. The first and last layer are left out.
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out")
# proj_out of a single-stream block takes the outputs of both its attention and its feed-forward part.
_FLUX = ((*_ATTENTION, *_JOINT), (*_JOINT_FEED_FORWARD, "proj_mlp", "proj_out"), ())
_BY_CLASS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "UNet2DConditionModel": (_ATTENTION, _FEED_FORWARD, _CONVOLUTIONS),
    "SD3Transformer2DModel": ((*_ATTENTION, *_JOINT), _JOINT_FEED_FORWARD, ()),
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    # The single-stream blocks join attention and feed-forward part in two matrices; # stands for a block's number.
    "Flux2Transformer2DModel": (
        (*_ATTENTION, *_JOINT, "to_qkv_mlp_proj", "single_transformer_blocks.#.attn.to_out"),
        ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        (),
    ),
    "QwenImageTransformer2DModel": (
        (*_ATTENTION, *_JOINT),
        ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        (),
    ),
    "SanaTransformer2DModel": (_ATTENTION, (), ()),  # its feed-forward part consists of convolutions
    "Lumina2Transformer2DModel": (
        _ATTENTION,
        ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
        (),
    ),
    "Krea2Transformer2DModel": (_ATTENTION, ("ff.gate", "ff.up", "ff.down"), ()),
    "ZImageTransformer2DModel": (_ATTENTION, ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"), ()),
}


def denoiser_name(pipe: Any) -> str:
    """ "unet" or "transformer": the pipeline's attribute of the denoiser, and its prefix in LoRA files."""
    return "unet" if "unet" in pipe.components else "transformer"


def denoiser(pipe: Any) -> Any:
    """The network of a pipeline that is trained."""
    return getattr(pipe, denoiser_name(pipe))


def target_modules(model: Any, targets: str) -> list[str]:
    """Names for `LoraConfig.target_modules` of a denoiser.

    Raises:
        ValueError: the targets are unknown.
    """
    if targets not in TARGETS:
        raise ValueError(f"unknown LoRA targets {targets!r}: use {', '.join(TARGETS)}")
    attention, feed_forward, convolutions = _BY_CLASS[type(model).__name__]
    names = [
        *attention,
        *(feed_forward if targets != "attention" else ()),
        *(convolutions if targets == "all" else ()),
    ]
    numbers = range(model.config.num_single_layers if any("#" in name for name in names) else 0)
    return [one for name in names for one in ([name.replace("#", str(i)) for i in numbers] if "#" in name else [name])]
