"""Sizes of the demo networks, and the tokenizer built from the caption words."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from alignprop_fast.demo.vocabulary import all_words
from alignprop_fast.making.scenes import PICTURE_PIXELS

MAX_TOKENS = 24
TEXT_WIDTH = 128
LATENT_CHANNELS = 8
START, END = "<|startoftext|>", "<|endoftext|>"


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token, most frequent pair first (Sennrich et al. 2016, algorithm 1).

    Ties go to the alphabet: the `tokenizers` library breaks them at random, and token numbers would change by the run.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in spelled:
            for place in reversed(range(len(word) - 1)):
                if (word[place], word[place + 1]) == best:
                    word[place : place + 2] = ["".join(best)]
    return merges


def write_tokenizer(folder: Path):
    """Writes CLIP's byte-level BPE with merges of the caption words to `folder`; returns the `CLIPTokenizer`.

    Every caption word becomes one token; any other text is spelled in bytes, so no prompt is unknown.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    merges = learn_merges(all_words())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _text_settings(tokenizer, width: int) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**_text_settings(tokenizer, TEXT_WIDTH)))


def build_vae():
    """64 x 64 x 3 pictures to 16 x 16 x 8 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 24, 48),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=PICTURE_PIXELS,
        mid_block_add_attention=False,
    )


def build_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=PICTURE_PIXELS // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 88),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads in this class
        norm_num_groups=8,
    )


def build_scheduler():
    """Cosine noise levels (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17) that end in pure noise.

    With the prediction of v this is flow matching along a circle (TrigFlow: Lu and Song 2024, arXiv 2410.11081).
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # without a meaning here; diffusers warns of any other number
        clip_sample=False,
    )


def build_clip(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "image_size": PICTURE_PIXELS,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 64,
    }
    text = _text_settings(tokenizer, 96)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def build_image_processor():
    from transformers import CLIPImageProcessor

    size = PICTURE_PIXELS
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
