"""Files that hold no model, by what they are: (content, words of the refusal)."""

import struct

import torch

from .original_layout import UNET_PREFIX


def only(*names: str) -> dict[str, torch.Tensor]:
    """Tensors of these names, square unless the name says "vector"."""
    return {name: torch.zeros(8, 8) for name in names}


NO_MODEL = {
    "LoRA in diffusers' names": (
        only("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
        "holds a LoRA, not a model: give the model that it was trained on",
    ),
    "LoRA in kohya's names": (
        only("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
        "holds a LoRA, not a model",
    ),
    "LoRA in PEFT's or ComfyUI's names": (
        only("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"),
        "holds a LoRA, not a model",
    ),
    "LyCORIS (LoHa, LoKr)": (only("lora_unet_mid_block.hada_w1_a"), "holds a LoRA, not a model"),
    "VAE alone": (
        only(
            "first_stage_model.encoder.conv_in.weight",
            "first_stage_model.decoder.conv_in.weight",
            "first_stage_model.quant_conv.weight",
        ),
        "holds a VAE, not a model: give the model with its denoiser",
    ),
    "ControlNet": (
        only(
            "control_model.input_blocks.0.0.weight",
            "control_model.zero_convs.0.0.weight",
            "control_model.middle_block_out.0.bias",
        ),
        "holds a ControlNet or T2I-Adapter, not a model",
    ),
    "ControlNet in diffusers' names": (
        only("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"),
        "holds a ControlNet or T2I-Adapter, not a model",
    ),
    "IP-Adapter": (
        only("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight"),
        "holds an IP-Adapter, not a model: give the text-to-image model itself",
    ),
    "upscaler (ESRGAN)": (
        only("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight"),
        "holds an upscaler: give a text-to-image model",
    ),
    "embedding (textual inversion)": (
        only("emb_params"),
        "holds an embedding (textual inversion), not a model: give the text-to-image model itself",
    ),
    "embedding of SDXL": (only("clip_l", "clip_g"), "holds an embedding (textual inversion), not a model"),
    "CLIP text encoder alone": (
        only("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight", "text_model.x"),
        "holds a text encoder alone: give the model with its denoiser",
    ),
    "T5 alone": (
        only("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
        "holds a text encoder alone",
    ),
    "CLIP image encoder": (
        only("vision_model.encoder.layers.0.mlp.fc1.weight", "visual_projection.weight", "vision_model.x"),
        "holds an image encoder (CLIP): give a text-to-image model",
    ),
    "SDXL's refiner": (
        only("conditioner.embedders.0.model.ln_final.bias", UNET_PREFIX + "input_blocks.0.0.weight", "x"),
        "holds SDXL's refiner, which needs a picture",
    ),
    "fp8 weights with scales": (
        only(UNET_PREFIX + "input_blocks.0.0.weight", UNET_PREFIX + "out.2.scale_weight", "scaled_fp8"),
        "holds fp8 weights with scales, which diffusers does not apply: give the file in fp16 or bf16",
    ),
    "bitsandbytes' nf4 weights": (
        only(
            "double_blocks.0.img_attn.qkv.weight",
            "x",
            "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4",
        ),
        "holds bitsandbytes' 4-bit weights: give the file in fp16 or bf16 (--base-dtype nf4 stores them so)",
    ),
    "model of another architecture": (
        only("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.head.weight"),
        "give an SD, SDXL, SD3, FLUX, Chroma, FLUX.2, Z-Image, Krea 2, Lumina 2, SANA or Qwen-Image model",
    ),
}
BYTES = {
    "GGUF, also under the name .safetensors": (
        b"GGUF\x03\0\0\0" + bytes(64),
        "is a GGUF, whose quantised weights cannot be trained on: give the model in fp16 or bf16 (.safetensors)",
    ),
    "pickle under the name .safetensors": (
        b"PK\x03\x04" + bytes(64),
        "is a pickle or another archive, which could run code when it is loaded: give a .safetensors file",
    ),
    "old pickle (.ckpt, .pt, .bin)": (
        b"\x80\x02}q\0." + bytes(64),
        "is a pickle, which could run code when it is loaded: give a .safetensors file",
    ),
    "web page saved in place of the file": (
        b"<!DOCTYPE html><html><title>Access denied",
        "is a web page: download the file itself; gated models need hf auth login first",
    ),
    "error message saved in place of the file": (
        b'{"error": "Repository not found"}',
        "is text, not a .safetensors file: give one",
    ),
    "pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "is a Git LFS pointer instead of the file: fetch the file with git lfs pull, or download it",
    ),
    "empty file": (b"", "is empty (0 bytes), damaged: copy or download it again"),
    "file cut off on the way": (struct.pack("<Q", 999) + b'{"a":', "copy or download it again"),
    "Windows' `:Zone.Identifier` note": (
        b"[ZoneTransfer]\r\nZoneId=3",
        "is Windows' note about a download: give the file beside it",
    ),
}
