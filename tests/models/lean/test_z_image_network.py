"""Z-Image's network on captions in one tensor against diffusers' own forward, which cuts captions to their lengths.

Tolerance: fp32 sums of at most 128 tokens in another order; measured 1e-6, asserted at 1e-4 of the largest number.
"""

import pytest
import torch

from alignprop_fast.models.lean.z_image_network import run_network


@pytest.mark.parametrize("lengths", [(5, 40), (33, 64)])
def test_output_is_that_of_diffusers_whatever_stands_behind_a_caption(tiny_z_image, lengths):
    network, generator = tiny_z_image.transformer, torch.Generator().manual_seed(0)
    x = torch.randn(2, network.in_channels, 4, 6, generator=generator)
    text = torch.randn(2, 70, network.config.cap_feat_dim, generator=generator)
    time, counts = torch.tensor([0.3, 0.7]), torch.tensor(lengths, dtype=torch.int32)
    captions = [row[:length] for row, length in zip(text, lengths, strict=True)]
    with torch.no_grad():
        theirs = torch.stack(network(list(x.unsqueeze(2)), time, captions, return_dict=False)[0]).squeeze(2)
        ours = run_network(network, x, time, text, counts, 64, alike=lengths[0] > 32)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
