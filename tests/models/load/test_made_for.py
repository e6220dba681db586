"""Steps and scales of guidance that a model was made for."""

import pytest

from alignprop_fast.cli.parts import sampling_of
from alignprop_fast.making.random_weights import make_folder
from alignprop_fast.models.load.made_for import made_for
from alignprop_fast.training.options import TrainOptions


def sampled(**options):
    """Steps and guidance scale of a run with these options."""
    found = sampling_of(TrainOptions(**options))
    return found.num_inference_steps, found.guidance_scale


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    return str(make_folder("z_image", tmp_path_factory.mktemp("models") / "turbo", turbo=True))


def test_turbo_draws_in_8_steps_without_guidance(turbo, tiny_z_image_folder, tiny_sd_folder):
    for model in (turbo, "z-image-turbo"):
        assert sampled(model=model) == (8, 0.0)
    assert made_for("x.safetensors", turbo).is_distilled
    for model in (tiny_z_image_folder, tiny_sd_folder, "z-image", "nowhere"):
        assert sampled(model=str(model)) == (50, 5.0)
    assert sampled(model="demo") == (12, 2.0)
    assert sampled(model="demo-twin") == (4, 1.0)


def test_what_is_given_counts(turbo, caplog):
    assert sampled(model=turbo, num_inference_steps=4) == (4, 0.0) and not caplog.records
    assert sampled(model=turbo, guidance_scale=2.0) == (8, 2.0)
    (record,) = caplog.records
    assert "distilled to draw without guidance" in record.getMessage()


def test_a_distilled_klein_draws_in_4_steps(tiny_flux2_klein_folder, tmp_path):
    distilled = make_folder("flux2_klein", tmp_path / "klein", distilled=True)
    assert sampled(model="flux2-dev") == (50, 4.0)
    for model in (distilled, "flux2-klein-4b", "flux2-klein-9b"):
        assert sampled(model=str(model)) == (4, 1.0)
    assert sampled(model=str(tiny_flux2_klein_folder)) == (50, 4.0)


@pytest.mark.parametrize(("model", "steps", "scale"), [("chroma", 35, 5.0), ("lumina2", 30, 4.0), ("sana", 20, 4.5)])
def test_models_with_guidance_in_fewer_steps(model, steps, scale, request):
    for given in (model, request.getfixturevalue(f"tiny_{model}_folder")):
        assert sampled(model=str(given)) == (steps, scale)


def test_krea2(tiny_krea2_folder):
    assert sampled(model=str(tiny_krea2_folder)) == sampled(model="krea2") == (28, 4.5)


def test_qwen_image_is_guided_against_a_negative_prompt(tiny_qwen_image_folder, caplog):
    for model in (str(tiny_qwen_image_folder), "qwen-image"):
        found = sampling_of(TrainOptions(model=model, negative_prompt=" "))
        assert found == (50, 1.0, 4.0) and not caplog.records
        resumed = TrainOptions(model=model, negative_prompt=" ", **found._asdict())  # as config.yaml has it
        assert sampling_of(resumed) == found and not caplog.records
    sampled(model="qwen-image", true_cfg_scale=1.0)
    assert not caplog.records
    sampled(model="qwen-image", guidance_scale=4.0)
    of_scale, of_prompt = [record.getMessage() for record in caplog.records]
    assert "qwen-image is guided by --true-cfg-scale and --negative-prompt" in of_scale
    assert "draws without guidance: add --negative-prompt ' ' to guide it" in of_prompt
