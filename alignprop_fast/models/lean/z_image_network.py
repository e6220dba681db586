"""Z-Image's network on captions in one tensor, with their lengths as numbers on the device.

diffusers cuts each caption to its length, so shapes follow the lengths, and a CUDA graph would hold for these lengths
alone. Here they follow the longest caption, rounded up. Blocks and weights are those of the given network.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from alignprop_fast.models.lean.patches import as_tokens, from_tokens, is_before

PATCH = "2-1"  # sides and frames of a patch


def run_network(
    network: Any,
    x_BCHW: torch.Tensor,
    time_B: torch.Tensor,
    text_BLC: torch.Tensor,
    lengths_B: torch.Tensor,
    longest: int,
    alike: bool,
) -> torch.Tensor:
    """The output [B, C, H, W] of a `ZImageTransformer2DModel` at latents x.

    Image and caption are filled up with learned tokens to a multiple of 32, which other tokens read. Behind these a
    shorter caption has padding that no other token reads.

    Args:
        text_BLC: captions, each with anything behind its end.
        lengths_B: tokens of each, int32 on the device.
        longest: tokens of the longest caption, rounded up to a multiple of 32.
        alike: whether all captions are as long after rounding up.
    """
    modulation = network.t_embedder(time_B * network.t_scale).type_as(x_BCHW)
    read_B = (lengths_B + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF
    image, image_turns = _image(network, x_BCHW, read_B)
    caption, caption_turns = _caption(network, text_BLC, lengths_B, longest)
    for block in network.noise_refiner:
        image = block(image, None, image_turns, modulation)
    mask = None if alike else is_before(longest, read_B)
    for block in network.context_refiner:
        caption = block(caption, mask, caption_turns)
    tokens, turns = torch.cat([image, caption], 1), torch.cat([image_turns, caption_turns], 1)
    mask = None if alike else is_before(tokens.shape[1], image.shape[1] + read_B)
    for block in network.layers:
        tokens = block(tokens, mask, turns, modulation)
    rows, columns = (side // 2 for side in x_BCHW.shape[2:])
    return from_tokens(network.all_final_layer[PATCH](tokens, c=modulation)[:, : rows * columns], rows)


def _image(network: Any, x_BCHW: torch.Tensor, read_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and angles of the image; its positions lie behind its caption's, on the first axis."""
    tokens = network.all_x_embedder[PATCH](as_tokens(x_BCHW))
    missing = -tokens.shape[1] % SEQ_MULTI_OF
    tokens = torch.cat([tokens, network.x_pad_token.expand(len(tokens), missing, -1)], 1)
    rows, columns = (torch.arange(side // 2, device=read_B.device) for side in x_BCHW.shape[2:])
    grid = F.pad(torch.cartesian_prod(rows, columns), (1, 0))
    places = F.pad(grid + F.pad((read_B + 1)[:, None, None], (0, 2)), (0, 0, 0, missing))
    return tokens, network.rope_embedder(places.flatten(0, 1)).unflatten(0, places.shape[:2])


def _caption(
    network: Any, text_BLC: torch.Tensor, lengths_B: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and angles of the captions."""
    text = F.pad(text_BLC, (0, 0, 0, longest - text_BLC.shape[1]))
    is_text = is_before(longest, lengths_B)[:, :, None]
    tokens = torch.where(is_text, network.cap_embedder(text), network.cap_pad_token)
    places = F.pad(torch.arange(1, longest + 1, device=lengths_B.device)[:, None], (0, 2))
    return tokens, network.rope_embedder(places).expand(len(tokens), -1, -1)
