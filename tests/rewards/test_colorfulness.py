"""Colourfulness against the paper's formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.colorfulness import Colorfulness


def hasler_suesstrunk(picture_HWC: np.ndarray) -> float:
    red, green, blue = np.moveaxis(picture_HWC.astype(np.float64), -1, 0)
    rg, yb = red - green, 0.5 * (red + green) - blue
    return np.hypot(np.std(rg), np.std(yb)) + 0.3 * np.hypot(np.mean(rg), np.mean(yb))


@pytest.mark.parametrize(("name", "size"), [("demo", 64), ("photos", 256)])
def test_equals_the_formula_on_real_pictures(pictures, name, size):
    images = pictures(name, size)
    scores, _ = get_reward("colorfulness")(images, [""] * len(images), [None] * len(images))
    expected = [hasler_suesstrunk(picture) for picture in (images * 255).round().permute(0, 2, 3, 1).numpy()]
    # The epsilon under the roots adds at most 1.3e-3, on grey pictures; the rest is fp32 over 65,536 pixels.
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1.4e-3)
    assert max(expected) > 30  # not all of them grey


def test_known_values():
    red, red_and_green = torch.zeros(2, 1, 3, 1, 2)
    red[:, 0] = 1  # rg = 255, yb = 127.5, no spread
    red_and_green[0, 0, 0, 0] = red_and_green[0, 1, 0, 1] = 1  # rg = 255 and -255, yb = 127.5 twice
    scores, _ = Colorfulness()(torch.cat([red, red_and_green]), ["", ""], [None, None])
    assert scores.tolist() == pytest.approx([0.3 * np.hypot(255, 127.5), 255 + 0.3 * 127.5], abs=2e-3)


def test_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Colorfulness()(x, ["", ""], [None, None])[0], images)


def test_grey_has_a_finite_gradient_and_half_precision_is_upcast():
    image = torch.full((1, 3, 8, 8), 0.5, dtype=torch.bfloat16, requires_grad=True)
    scores, _ = Colorfulness()(image, [""], [None])
    scores.sum().backward()
    assert scores.dtype == torch.float32 and 0 <= scores.item() < 2e-3
    assert image.grad is not None and image.grad.isfinite().all()
