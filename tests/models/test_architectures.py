"""Published architectures at full size on the meta device: parameter counts as published, and they run."""

import pytest
import torch

from alignprop_fast.models import adapt
from alignprop_fast.models.architectures import NAMES, architecture, parameters
from alignprop_fast.models.conditioning import PromptBatch
from alignprop_fast.models.load.pipeline import load_pipeline

# Frozen denoiser, VAE, text encoders: elements in the published weights.
PUBLISHED = {
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480 + 694_659_840),
    "sd35-medium": (2_243_171_520, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656),
    "flux-dev": (11_901_408_320, 83_819_683, 123_060_480 + 4_762_310_656),
    "chroma": (8_899_983_424, 83_819_683, 4_762_310_656),  # the file of Chroma1-HD has 17.8 GB in bf16
    **dict.fromkeys(("z-image", "z-image-turbo"), (6_154_908_736, 83_819_683, 4_022_468_096)),
    "flux2-klein-4b": (3_875_544_576, 84_046_115, 4_022_468_096),
    "flux2-klein-9b": (9_078_581_248, 84_046_115, 8_190_735_360),
    "flux2-dev": (32_223_281_152, 84_046_115, 24_011_361_280),
    "qwen-image": (20_430_401_088, 126_892_531, 8_292_166_656),
    "sana": (1_604_462_752, 312_250_275, 2_614_341_888),
    "lumina2": (2_609_769_152, 83_819_683, 2_614_341_888),
    # We had no access to Krea 2's weights: this is the number of diffusers' default configuration.
    "krea2": (12_820_073_036, 126_892_531, 4_437_815_808),
}


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return request.param, architecture(request.param, torch.bfloat16, adapter_dtype=torch.bfloat16)


def test_parameter_counts_are_those_of_the_published_weights(model):
    name, adapter = model
    counts = parameters(adapter)
    assert (counts["denoiser"], counts["vae"], counts["text"]) == PUBLISHED[name]
    assert counts["adapters"] > 0


@pytest.mark.slow("builds the published models at full size")
def test_a_step_and_the_decoder_run_on_meta(model):
    _, adapter = model
    height, width = (side + shift for side, shift in zip(adapter.image_size(None, None), (64, -64), strict=True))
    x = adapter.initial_latents(1, (height, width), None, None)
    assert x.shape == (1, *adapter.latent_shape((height, width)))
    cond = adapter.blank_conditioning(1, True, (height, width))
    y = adapter.predict(x, torch.tensor(500.0, device=adapter.device), cond)
    assert y.shape == (2, *x.shape[1:]) and y.dtype == torch.bfloat16 and y.device.type == "meta"
    assert torch.autograd.grad(y.sum(), adapter.trainable()[:1])[0].dtype == torch.bfloat16
    assert adapter.decode(x).shape == (1, 3, height, width)


def test_default_dtype_is_left_alone():
    architecture("sd15", torch.float16)
    assert torch.get_default_dtype() == torch.float32


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="sd15, sdxl, sd35-medium, flux-dev, chroma, z-image, z-image-turbo"):
        architecture("sd16")


@pytest.mark.parametrize(
    "model",
    [
        *("tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_chroma", "tiny_z_image"),
        *("tiny_flux2_klein", "tiny_qwen_image", "tiny_krea2", "tiny_lumina2", "tiny_sana"),
    ],
)
def test_blank_conditioning_has_the_shapes_of_encoded_prompts(model, request):
    adapter = adapt(request.getfixturevalue(model))
    size = adapter.image_size(None, None)
    blank = adapter.blank_conditioning(2, True, size)
    real = adapter.encode(PromptBatch(["red cat", "dog"], ["", ""], True, size))
    assert blank.embeds.shape == real.embeds.shape and blank.branches == real.branches
    assert {k: v.shape for k, v in (blank.added or {}).items()} == {k: v.shape for k, v in (real.added or {}).items()}


def test_blank_conditioning_of_the_bundled_model():
    """Its texts are shorter than CLIP's 77 tokens."""
    adapter = adapt(load_pipeline("demo"))
    real = adapter.encode(PromptBatch(["an apple"], None, True, (64, 64)))
    assert adapter.blank_conditioning(1, True, (64, 64)).embeds.shape == real.embeds.shape
    adapter.pipe.register_modules(text_encoder=None)  # embeddings made beforehand, by an encoder that is gone
    assert adapter.blank_conditioning(1, True, (64, 64)).embeds.shape[1] == 77
