"""The bundled model as a rectified flow: a perfect prediction of v becomes a perfect prediction of noise - picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.learning.rectified_flow import RectifiedFlow


class Perfect(torch.nn.Module):
    """Predicts v of known latents; `asked` is the timestep of its last call."""

    config = SimpleNamespace(in_channels=4, sample_size=8, cross_attention_dim=2)

    def __init__(self, clean, noise, angles):
        super().__init__()
        self.clean, self.noise, self.angles = clean, noise, angles

    def forward(self, x, timestep, text, return_dict):
        self.asked = float(timestep)
        angle = float(np.interp(self.asked, np.arange(len(self.angles)), self.angles))
        assert torch.allclose(x, np.cos(angle) * self.clean + np.sin(angle) * self.noise, atol=1e-4)
        return (np.cos(angle) * self.noise - np.sin(angle) * self.clean,)


@pytest.mark.parametrize("s", [1.0, 0.7, 0.2])
def test_it_predicts_the_flow(s):
    """fp32 timesteps of 1,000 levels: 1e-4."""
    clean, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = np.linspace(0.01, np.pi / 2, 1000)
    unet = Perfect(clean, noise, angles)
    flow = RectifiedFlow(unet, torch.from_numpy(np.cos(angles) ** 2))
    found = flow((1 - s) * clean + s * noise, torch.full((3,), 1000 * s), torch.zeros(3, 1, 2))[0]
    assert torch.allclose(found, noise - clean, atol=1e-4) and (unet.asked == 999) == (s == 1)
