"""Guidance from a sampler's arguments."""

from dataclasses import dataclass

import pytest
import torch

from alignprop_fast.generate.guidance import Guidance


@dataclass
class Model:
    """What guidance asks of a model, as for Stable Diffusion where nothing else is given."""

    heeds_guidance: bool = True
    unguided_scale: float = 1.0
    has_true_cfg: bool = False
    keeps_norm: str = ""
    limits_guidance: bool = False


QWEN_IMAGE = Model(has_true_cfg=True, keeps_norm="patches")
Z_IMAGE = Model(unguided_scale=0.0, limits_guidance=True)


@pytest.mark.parametrize(
    ("has_true_cfg", "scale", "true_scale", "negative", "on"),
    [
        (False, 5.0, 1.0, False, True),
        (False, 1.0, 1.0, True, False),
        (True, 5.0, 2.0, True, True),
        (True, 5.0, 2.0, False, False),
        (True, 5.0, 1.0, True, False),
    ],
)
def test_who_runs_two_branches(has_true_cfg, scale, true_scale, negative, on):
    """FLUX and Qwen-Image need a negative prompt and a true scale; the others a scale above 1."""
    guidance = Guidance.of(Model(has_true_cfg=has_true_cfg), scale, true_scale)
    assert guidance.is_on(negative) is on and guidance.embedded_scale == scale
    assert guidance.cfg_scale == (true_scale if has_true_cfg else scale)


@pytest.mark.parametrize(("scale", "on"), [(4.0, True), (0.5, True), (0.0, False)])
def test_a_pipeline_that_counts_from_zero(scale, on):
    """Z-Image and Krea 2: c + s (c - u) = u + (1 + s) (c - u)."""
    guidance = Guidance.of(Z_IMAGE, scale)
    assert guidance.is_on(False) is on and guidance.cfg_scale == 1 + scale


def test_each_patch_keeps_the_norm_of_the_prediction_with_the_prompt():
    y = torch.randn(4, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guidance = Guidance.of(QWEN_IMAGE, 1.0, 3.0)
    guided, plain = guidance.guided(y, guidance.cfg_scale), Guidance.of(Model(), 3.0).guided(y, 3.0)
    assert not guidance.is_linear
    for rows, columns in ((slice(0, 2), slice(2, 4)), (slice(2, 4), slice(4, 6))):
        (patch, own, linear) = (x[0, :, rows, columns] for x in (guided, y[2:], plain))
        assert torch.allclose(patch, linear * own.norm() / linear.norm(), rtol=1e-12)
    with pytest.raises(ValueError, match="leave guidance_rescale out"):
        Guidance.of(QWEN_IMAGE, 1.0, 3.0, 0.5)


def test_each_row_keeps_the_norm_of_the_prediction_with_the_prompt():
    y = torch.randn(4, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guided = Guidance.of(Model(keeps_norm="rows"), 3.0).guided(y, 3.0)
    linear = y[:2] + 3 * (y[2:] - y[:2])
    assert torch.allclose(guided, linear * y[2:].norm(dim=-1, keepdim=True) / linear.norm(dim=-1, keepdim=True))


def test_guidance_ends_where_z_image_ends_it():
    """In fp32, where (1000 - 700) / 1000 is above 0.3."""
    guidance = Guidance.of(Z_IMAGE, 3.0, until=0.3)
    assert [guidance.reaches(timestep) for timestep in (1000.0, 701.0, 700.0)] == [True, True, False]
    assert Guidance.of(Z_IMAGE, 3.0).reaches(0.0)


def test_a_tensor_stays_one_where_it_learns():
    learns = torch.tensor(3.0, requires_grad=True)
    assert Guidance.of(Model(), learns).cfg_scale is learns
    assert Guidance.of(Model(), torch.tensor(3.0)).cfg_scale == 3.0


@pytest.mark.parametrize("arguments", [(torch.ones(2), 1.0, 0.0), (1.0, 1.0, torch.tensor(0.1, requires_grad=True))])
def test_what_cannot_serve_is_refused(arguments):
    with pytest.raises(ValueError, match="give"):
        Guidance.of(Model(), *arguments)


def test_a_model_that_is_not_guided_has_no_scale():
    distilled = Guidance.of(Model(heeds_guidance=False), 4.0)
    assert distilled.cfg_scale == 1.0 and not distilled.is_on(True)


@pytest.mark.parametrize(("option", "name"), [({"norm_limit": 1.0}, "normalization"), ({"until": 0.5}, "truncation")])
def test_limits_are_options_of_z_image(option, name):
    assert Guidance.of(Z_IMAGE, 4.0, **option).is_on(False)
    with pytest.raises(ValueError, match=f"cfg_{name} is an option of Z-Image: leave it out for other models"):
        Guidance.of(Model(), 4.0, **option)
