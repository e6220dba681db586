"""Lumina 2's network on texts in one tensor, with the image before the text, so that padding lies at the end.

diffusers joins text and image picture by picture, text first, and waits for the device to count the tokens. Attention
does not depend on the order of tokens, whose positions go along. Blocks and weights are those of the given network.
"""

from typing import Any

import torch
import torch.nn.functional as F

from alignprop_fast.models.lean.patches import as_tokens, from_tokens, is_before

Tensor = torch.Tensor


def run_network(
    network: Any, x_BCHW: Tensor, time_B: Tensor, text_BLC: Tensor, turns_BNP: Tensor, lengths_B: Tensor, alike: bool
) -> Tensor:
    """The output [B, C, H, W] of a `Lumina2Transformer2DModel` at latents x.

    Args:
        time_B: 0 for noise, 1 for the picture.
        text_BLC: texts, each with anything behind its end.
        turns_BNP: the rotation of each token, image tokens first, as complex numbers (`turns`).
        lengths_B: tokens of each text, int32 on the device.
        alike: whether all texts have L tokens.
    """
    modulation, text = network.time_caption_embed(x_BCHW, time_B, text_BLC)
    image = network.x_embedder(as_tokens(x_BCHW))
    images, texts = image.shape[1], text.shape[1]
    of_text, of_all = (
        (None, None) if alike else (is_before(texts, lengths_B), is_before(images + texts, images + lengths_B))
    )
    for block in network.context_refiner:
        text = block(text, of_text, turns_BNP[:, images:])
    for block in network.noise_refiner:
        image = block(image, None, turns_BNP[:, :images], modulation)
    tokens = torch.cat([image, text], 1)
    for block in network.layers:
        tokens = block(tokens, of_all, turns_BNP, modulation)
    return from_tokens(network.norm_out(tokens[:, :images], modulation), x_BCHW.shape[2] // 2)


def turns(network: Any, grid: tuple[int, int], texts: int, lengths_B: Tensor) -> Tensor:
    """The rotation of image tokens, then of text tokens, [B, N, P] complex.

    On the first axis text tokens are counted and image tokens lie behind their text. On the other two axes image tokens
    have row and column.

    Args:
        grid: rows and columns of image tokens.
        texts: tokens of a text with its padding.
        lengths_B: tokens of each text, on the CPU.
    """
    rope, (rows, columns) = network.rope_embedder, grid
    image = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    image = image + F.pad(lengths_B[:, None, None], (0, 2))
    text = F.pad(torch.arange(texts)[:, None], (0, 2)).expand(len(lengths_B), -1, -1)
    places = torch.cat([image, text], 1).double()
    rates = [rope.theta ** (-torch.arange(0, width, 2).double() / width) for width in rope.axes_dim]
    angles = torch.cat([places[..., axis, None] * rate for axis, rate in enumerate(rates)], -1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
