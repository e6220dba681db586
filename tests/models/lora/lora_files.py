"""Tensors of small LoRA files of one layer, in several namings."""

import torch

from alignprop_fast.models.lora.file import DOWN, UP

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
ENDS = (".lora_down.weight", ".lora_up.weight")  # kohya's
PLAIN = f"unet.{BLOCK}.attn1.to_q"
KOHYA = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
MIDDLE = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"  # the same layer
PEFT = f"base_model.model.{BLOCK}.attn1.to_q"


def pair(name, down=DOWN, up=UP, dtype=torch.float32):
    """Factors of rank 2 of a layer of 64 channels, as tiny_sd's: the product is 2 everywhere."""
    return {name + down: torch.ones(2, 64, dtype=dtype), name + up: torch.ones(64, 2, dtype=dtype)}


def kohya_with(**more):
    """The pair and further tensors of the layer."""
    return {**pair(KOHYA, *ENDS), **{f"{KOHYA}.{key}": tensor for key, tensor in more.items()}}
