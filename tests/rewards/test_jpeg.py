"""The smooth JPEG size against Pillow's encoder, and as a function that an optimiser can follow."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.jpeg import JpegSize
from alignprop_fast.rewards.jpeg_calibration import jpeg_bytes, rank_correlation


def true_kb(images_BCHW: Tensor) -> Tensor:
    return torch.tensor([jpeg_bytes(image) / 1000 for image in images_BCHW])


@pytest.mark.parametrize(("name", "size"), [("demo", 64), ("photos", 64), ("photos", 256), ("photos", 512)])
def test_ranks_and_sizes_of_real_pictures(pictures, name, size):
    images = pictures(name, size)
    assert len(images) >= 7
    estimate, truth = JpegSize()(images), true_kb(images)
    # The reward promises 0.9; 0.97 to 1.0 was measured. The largest measured error is 5 %.
    assert rank_correlation(estimate, truth) >= 0.9
    torch.testing.assert_close(estimate, truth, rtol=0.1, atol=0)


@pytest.mark.parametrize("quality", [20, 50, 75, 95])
def test_quantisation_steps_and_zigzag_are_pillows(quality):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="JPEG", quality=quality)
    tables = Image.open(buffer).quantization  # row by row
    estimate = JpegSize(quality)
    for table, basis_PK in ((tables[0], estimate.luma_dct), (tables[1], estimate.chroma_dct)):
        steps_K = 1 / basis_PK.double().norm(dim=0)  # the DCT is orthonormal
        # Coefficient k belongs to the frequency where its basis picture has its only peak in a second, unscaled DCT.
        position_K = (frequency_basis() @ basis_PK.double()).abs().argmax(0)
        assert position_K[:6].tolist() == [0, 1, 8, 16, 9, 2]
        assert position_K[-3:].tolist() == [55, 62, 63]
        torch.testing.assert_close(steps_K, torch.tensor(table, dtype=torch.float64)[position_K], rtol=1e-5, atol=0)


def frequency_basis() -> Tensor:
    n = torch.arange(8, dtype=torch.float64)
    rows = torch.cos(torch.pi / 8 * (n + 0.5) * n[:, None])
    rows = rows / rows.norm(dim=1, keepdim=True)
    return torch.kron(rows, rows)


@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (33, 16), (50, 70)])
def test_any_size(pictures, shape):
    images = pictures("photos", 256)[:, :, : shape[0], : shape[1]]
    # If a size is not a multiple of 16, the estimate is too high, measured up to 10 %: the encoder writes blocks
    # outside the picture as empty, but the estimate counts the repeated border in them.
    torch.testing.assert_close(JpegSize()(images), true_kb(images), rtol=0.12, atol=0)


def test_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 9, 17, dtype=torch.float64) * 0.2 + 0.4
    # The score is in kB: in bytes the derivatives are of order one, far above gradcheck's absolute tolerance of 1e-5.
    assert torch.autograd.gradcheck(lambda x: JpegSize()(x) * 1000, images.requires_grad_())


def test_scores_do_not_depend_on_the_batch(pictures):
    images, reward = pictures("demo", 64), get_reward("compressibility")
    prompts = [""] * len(images)
    together, _ = reward(images, prompts, prompts)
    alone = [reward(image[None], [""], [None])[0] for image in images]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=0)  # order of summation in fp32


def test_half_precision_images_and_autocast_score_as_fp32(pictures):
    images = pictures("demo", 64)[:4].bfloat16()
    expected = JpegSize()(images.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = JpegSize()(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_flat_picture_has_a_finite_gradient():
    image = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    JpegSize()(image).sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()


@pytest.mark.parametrize(("name", "factor"), [("compressibility", 0.98), ("incompressibility", 1.1)])
def test_gradient_ascent_changes_the_true_size(pictures, name, factor):
    start = torch.cat([pictures("demo", 64)[:4], pictures("photos", 64)[:4]])
    reward, images = get_reward(name), start.clone()
    for _ in range(20):
        images.requires_grad_()
        scores, _ = reward(images, [""] * 8, [None] * 8)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        images = (images.detach() + 2 / 255 * gradient / largest).clamp(0, 1)
    # Measured: -4 % and +19 % on the demo pictures.
    before, after = true_kb(start), true_kb(images)
    assert after.sum() <= factor * before.sum() if factor < 1 else after.sum() >= factor * before.sum()
    assert ((after < before) if factor < 1 else (after > before)).all()


def test_names_have_opposite_signs_and_kb(pictures):
    images = pictures("photos", 64)[:2]
    less, _ = get_reward("compressibility")(images, ["", ""], [None, None])
    more, _ = get_reward("incompressibility")(images, ["", ""], [None, None])
    assert torch.equal(less, -more)
    torch.testing.assert_close(more, true_kb(images), rtol=0.1, atol=0)
