"""Qwen-Image's network without the copies to the device that diffusers makes for a text mask.

A CUDA graph cannot record those. Blocks and weights are those of the given network.
"""

from typing import Any

import torch

Tensor = torch.Tensor


def run_network(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    text: Tensor,
    mask: Tensor | None,
    grid: tuple[int, int],
) -> Tensor:
    """The output [B, N, C] of a `QwenImageTransformer2DModel` that draws from a text alone.

    Args:
        hidden_states: image tokens [B, N, C].
        timestep: [B], 1 for noise, 0 for the picture.
        text: [B, T, E]; mask: [B, T], True for text, False for the padding behind it; None: no padding.
        grid: rows and columns of the image tokens.
    """
    image, text = network.img_in(hidden_states), network.txt_in(network.txt_norm(text))
    time = network.time_text_embed(timestep.to(image.dtype), image, None)
    angles = network.pos_embed([(1, *grid)], max_txt_seq_len=text.shape[1], device=image.device)
    for block in network.transformer_blocks:
        text, image = block(image, text, mask, time, angles)
    return network.proj_out(network.norm_out(image, time))
