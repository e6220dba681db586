"""Krea 2's network with the image before the text, so that padding of shorter texts lies at the end.

diffusers puts the text first. Attention does not depend on the order of tokens, whose positions go along. Blocks and
weights are those of the given network.
"""

from typing import Any

import torch
import torch.nn.functional as F

from alignprop_fast.models.lean.krea2 import key_padding

Tensor = torch.Tensor


def run_network(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    text: Tensor,
    lengths: Tensor | None,
    grid: tuple[int, int],
) -> Tensor:
    """The output [B, N, C] of a `Krea2Transformer2DModel` at image tokens.

    Args:
        hidden_states: image tokens [B, N, C].
        timestep: [B], 1 for noise, 0 for the picture.
        text: T tokens, of each the states of L layers of the text encoder, [B, T, L, E].
        lengths: text tokens of each row, [B] in int32 on the device; the rest of a row is padding. None: T.
        grid: rows and columns of the image tokens.
    """
    images, texts = hidden_states.shape[1], text.shape[1]
    time = network.time_embed(timestep, dtype=hidden_states.dtype)
    modulation = network.time_mod_proj(F.gelu(time, approximate="tanh"))
    of_text = of_all = None
    if lengths is not None:
        attn = network.transformer_blocks[0].attn
        of_text, of_all = key_padding(attn, lengths, texts), key_padding(attn, lengths + images, images + texts)
    text = network.txt_in(network.text_fusion(text, attention_mask=of_text))
    tokens = torch.cat([network.img_in(hidden_states), text], dim=1)
    rows, columns = (torch.arange(side, device=tokens.device) for side in grid)
    # The first of three axes is that of frames. Text tokens lie at the origin.
    angles = network.rotary_emb(F.pad(torch.cartesian_prod(rows, columns), (1, 0, 0, texts)))
    for block in network.transformer_blocks:
        tokens = block(tokens, modulation, angles, of_all)
    return network.final_layer(tokens[:, :images], time)
