"""A pipeline like the bundled one with a small UNet and random weights."""

import pytest
import torch

from alignprop_fast.demo import model_path
from alignprop_fast.making.networks import LATENT_CHANNELS, build_text_encoder, build_vae
from alignprop_fast.making.train_unet import build_pipeline


def _small_unet(seed):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=4,
    )


@pytest.fixture(scope="session")
def small_unet():
    """Makes a UNet of 4 x 4 latents from a seed."""
    return _small_unet


@pytest.fixture(scope="session")
def pipe():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model_path() / "tokenizer", local_files_only=True)
    modules = {"unet": _small_unet(0), "text_encoder": build_text_encoder(tokenizer)}
    vae = build_vae()
    for module in (vae, *modules.values()):
        module.requires_grad_(False)
    return build_pipeline(modules, vae, tokenizer)
