"""The networks of the pipelines: the real classes of diffusers and transformers, small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from alignprop_fast.making.random_weights.tokenizers import (
    CONTEXT_LENGTH,
    KREA_MARKS,
    QWEN_MARKS,
    clip_vocabulary,
    end_id,
    qwen_vocabulary,
    t5_vocabulary,
)

if TYPE_CHECKING:
    from transformers import CLIPTextConfig


HEADS, HEAD_WIDTH = 2, 16  # of the transformers
HEAD_SIZES = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH}
ROPE_AXES = (4, 6, 6)  # their sum is HEAD_WIDTH
FLUX_SCALES = (0.3611, 0.1159)  # scaling and shift of the latents, of FLUX.1 and of others that use its VAE
_EYES = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}


def unet(
    cross_width: int,
    layers_per_block: int,
    widths: tuple[int, ...] = (32, 64),
    latent_size: int = 8,
    norm_groups: int = 8,
    heads: int = 2,
    **conditioning: Any,
) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    levels = len(widths)
    return UNet2DConditionModel(
        sample_size=latent_size,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=cross_width,
        attention_head_dim=heads,  # diffusers reads this field as the number of heads
        norm_num_groups=norm_groups,
        **conditioning,
    )


def vae(
    scaling_factor: float,
    shift_factor: float | None = None,
    *,
    widths: tuple[int, ...] = (16, 32),
    norm_groups: int = 8,
) -> torch.nn.Module:
    """A VAE; with a shift it is like that of SD3 and FLUX: 16 channels, no convolutions around the latents."""
    from diffusers import AutoencoderKL

    levels, is_flow = len(widths), shift_factor is not None
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=16 if is_flow else 4,
        norm_num_groups=norm_groups,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=not is_flow,
        use_post_quant_conv=not is_flow,
    )


def flux2_vae() -> torch.nn.Module:
    """FLUX.2's VAE, with statistics of its patches that are not those of a new batch norm."""
    from diffusers import AutoencoderKLFlux2

    found = AutoencoderKLFlux2(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    found.bn.running_mean.normal_(std=0.2)
    found.bn.running_var.uniform_(0.5, 2)
    return found


def t5(width: int) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_vocabulary()),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def _decoder(width: int, num_layers: int, marks: tuple[str, ...] = QWEN_MARKS) -> dict[str, Any]:
    """Sizes of a language model."""
    return {
        "vocab_size": len(qwen_vocabulary()) + len(marks),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


def qwen3(num_layers: int = 3, causal_lm: bool = False) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(**_decoder(16, num_layers), head_dim=8, tie_word_embeddings=True)
    return Qwen3ForCausalLM(config) if causal_lm else Qwen3Model(config)


def gemma2() -> torch.nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return Gemma2Model(Gemma2Config(**_decoder(32, 2), **tokens, head_dim=8, query_pre_attn_scalar=8))


def mistral3() -> torch.nn.Module:
    """Mistral 3 with 30 layers, of which FLUX.2-dev reads the 10th, 20th and 30th, and without use for its eyes."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {"model_type": "mistral", **_decoder(16, 30), "head_dim": 8}
    eyes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    config = Mistral3Config(
        text_config=text, vision_config={"model_type": "pixtral", **eyes}, tie_word_embeddings=False
    )
    return Mistral3ForConditionalGeneration(config)


def qwen2_5_vl() -> torch.nn.Module:
    """Qwen2.5-VL without use for its eyes: a pipeline shows it no picture."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokens = {"bos_token_id": None, "eos_token_id": None}
    text = {**_decoder(32, 2), **tokens, "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}}
    eyes = {**_EYES, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eyes))


def qwen3_vl() -> torch.nn.Module:
    """Qwen3-VL without use for its eyes: a pipeline shows it no picture. It has three layers."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    rope = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    text = {**_decoder(32, 3, KREA_MARKS), "head_dim": 16, "rope_scaling": rope}
    eyes = {**_EYES, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=eyes))


def qwen_vae(widths: tuple[int, ...]) -> torch.nn.Module:
    """Qwen-Image's VAE, for videos. widths: of its levels, multiples of the first."""
    from diffusers import AutoencoderKLQwenImage

    *lower, _ = widths
    found = AutoencoderKLQwenImage(
        base_dim=widths[0],
        z_dim=4,
        dim_mult=[width // widths[0] for width in widths],
        num_res_blocks=1,
        temperal_downsample=[level > 0 for level in range(len(lower))],
        latents_mean=[-0.75, 0.25, 0.5, -0.1],
        latents_std=[2.5, 1.5, 2.0, 0.5],
    )
    for name, parameter in found.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)  # one when made anew, but not in published weights
    return found


def dc_ae() -> torch.nn.Module:
    """A deep-compression autoencoder with one block of linear attention; it shrinks by 8."""
    from diffusers import AutoencoderDC

    sides = ("encoder", "decoder")
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        **{f"{side}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) for side in sides},
        **{f"{side}_block_out_channels": (8,) * 4 for side in sides},
        **{f"{side}_layers_per_block": (1,) * 4 for side in sides},
        **{f"{side}_qkv_multiscales": ((), (), (), (5,)) for side in sides},
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )


def diffusion_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def text_config(
    width: int, pad_token_id: int, projection_dim: int = 32, hidden_act: str = "quick_gelu"
) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(clip_vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection_dim,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act=hidden_act,
        bos_token_id=end_id() - 1,
        eos_token_id=end_id(),
        pad_token_id=pad_token_id,
    )
