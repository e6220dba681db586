"""Steps and guidance scale that a model was made for."""

import pytest

from alignprop_fast.cli.parts import sampling_of
from alignprop_fast.making.random_weights import make_flux2_klein_folder, make_z_image_folder
from alignprop_fast.models.load.made_for import made_for
from alignprop_fast.training.options import TrainOptions


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    return str(make_z_image_folder(tmp_path_factory.mktemp("models") / "turbo", turbo=True))


def test_turbo_draws_in_8_steps_without_guidance(turbo, tiny_z_image_folder, tiny_sd_folder):
    for model in (turbo, "z-image-turbo"):
        assert sampling_of(TrainOptions(model=model)) == (8, 0.0)
    assert made_for("x.safetensors", turbo).is_distilled
    for model in (tiny_z_image_folder, tiny_sd_folder, "z-image", "nowhere"):
        assert sampling_of(TrainOptions(model=str(model))) == (50, 5.0)
    assert sampling_of(TrainOptions(model="demo")) == (12, 2.0)
    assert sampling_of(TrainOptions(model="demo-twin")) == (4, 1.0)


def test_what_is_given_counts(turbo, caplog):
    assert sampling_of(TrainOptions(model=turbo, num_inference_steps=4)) == (4, 0.0) and not caplog.records
    assert sampling_of(TrainOptions(model=turbo, guidance_scale=2.0)) == (8, 2.0)
    (record,) = caplog.records
    assert "distilled to draw without guidance" in record.getMessage()


def test_a_distilled_klein_draws_in_4_steps(tiny_flux2_klein_folder, tmp_path):
    distilled = make_flux2_klein_folder(tmp_path / "klein", distilled=True)
    assert sampling_of(TrainOptions(model="flux2-dev")) == (50, 4.0)
    for model in (distilled, "flux2-klein-4b", "flux2-klein-9b"):
        assert sampling_of(TrainOptions(model=str(model))) == (4, 1.0)
    assert sampling_of(TrainOptions(model=str(tiny_flux2_klein_folder))) == (50, 4.0)


def test_chroma_and_lumina2(tiny_chroma_folder, tiny_lumina2_folder):
    for model in (tiny_chroma_folder, "chroma"):
        assert sampling_of(TrainOptions(model=str(model))) == (35, 5.0)
    for model in (tiny_lumina2_folder, "lumina2"):
        assert sampling_of(TrainOptions(model=str(model))) == (30, 4.0)


def test_krea2(tiny_krea2_folder):
    assert (
        sampling_of(TrainOptions(model=str(tiny_krea2_folder))) == sampling_of(TrainOptions(model="krea2")) == (28, 4.5)
    )


def test_qwen_image_has_no_guidance_scale(tiny_qwen_image_folder, caplog):
    for model in (tiny_qwen_image_folder, "qwen-image"):
        assert sampling_of(TrainOptions(model=str(model))) == (50, 1.0) and not caplog.records
    sampling_of(TrainOptions(model="qwen-image", guidance_scale=4.0))
    (record,) = caplog.records
    assert "qwen-image is guided by --true-cfg-scale and --negative-prompt" in record.getMessage()
