"""The diversity figure: its value on vectors of known angles, and of pictures under the bundled CLIP."""

import pytest
import torch
from PIL import Image

from alignprop_fast.demo import pictures_path
from alignprop_fast.rewards.diversity import ImageEmbedder, mean_pairwise_distance


def test_mean_over_pairs():
    x, y = torch.eye(3)[:2]
    assert mean_pairwise_distance(torch.stack([x, x, x])) == pytest.approx(0)
    assert mean_pairwise_distance(torch.stack([x, -x])) == pytest.approx(2)
    # Distances of the three pairs: 0, 1, 1.
    assert mean_pairwise_distance(torch.stack([x, x, y])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="two or more pictures"):
        mean_pairwise_distance(x[None])


def test_different_pictures_are_farther_apart_than_noisy_copies():
    import numpy as np

    files = sorted(pictures_path().glob("*.png"))[:4]
    pictures = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) / 255 for file in files]
    embed, generator = ImageEmbedder(), torch.Generator().manual_seed(0)
    copies = torch.stack([pictures[0] + 0.02 * torch.randn(3, 64, 64, generator=generator) for _ in range(4)])
    with torch.no_grad():
        different, alike = embed(torch.stack(pictures)), embed(copies.clamp(0, 1))
    assert torch.allclose(different.norm(dim=-1), torch.ones(4), atol=1e-5)
    assert mean_pairwise_distance(different) > 10 * mean_pairwise_distance(alike)
