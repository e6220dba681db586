"""The tiny folders are what they claim to be: loadable, deterministic, named as the published models are."""

import pytest
import torch
from safetensors.torch import load_file


def _images(pipe):
    generator = torch.Generator().manual_seed(1)
    return pipe("the red cat", num_inference_steps=2, generator=generator, eta=1.0, output_type="pt").images


def test_sd_samples(tiny_sd):
    images = _images(tiny_sd)
    assert images.shape == (1, 3, 16, 16)
    assert images.std() > 0.05


def test_sdxl_samples(tiny_sdxl):
    images = _images(tiny_sdxl)
    assert images.shape == (1, 3, 16, 16)
    assert images.std() > 0.05


def test_tokenizer_pads_and_merges(tiny_sdxl):
    ids = tiny_sdxl.tokenizer("the red", padding="max_length").input_ids
    assert len(ids) == 77
    assert tiny_sdxl.tokenizer.convert_ids_to_tokens(ids[:5])[1:3] == ["the</w>", "red</w>"]
    assert ids[-1] == tiny_sdxl.tokenizer.eos_token_id
    assert tiny_sdxl.tokenizer_2("the red", padding="max_length").input_ids[-1] == 0


def test_text_encoder_weights_are_named_as_published(tiny_sd_folder):
    names = load_file(tiny_sd_folder / "text_encoder" / "model.safetensors")
    assert names and all(name.startswith("text_model.") for name in names)


def test_loading_finds_every_text_encoder_weight(tiny_sd, tiny_sd_folder):
    """A name mismatch leaves weights at fresh random values with no more than a warning."""
    saved = load_file(tiny_sd_folder / "text_encoder" / "model.safetensors")
    for name, tensor in tiny_sd.text_encoder.state_dict().items():
        assert torch.equal(tensor, saved["text_model." + name.removeprefix("text_model.")]), name


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_flow_models_sample_and_keep_their_weights(kind, request):
    pipe, folder = request.getfixturevalue(f"tiny_{kind}"), request.getfixturevalue(f"tiny_{kind}_folder")
    images = pipe("the red cat", num_inference_steps=2, height=16, width=24, output_type="pt").images
    assert images.shape == (1, 3, 16, 24) and images.std() > 0.05
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if (folder / name).is_dir():
            saved = load_file(folder / name / "model.safetensors")
            state = getattr(pipe, name).state_dict()
            # One text encoder's class drops the prefix when loaded; T5 shares its one embedding.
            for key, tensor in saved.items():
                assert torch.equal(state.get(key, state.get(key.removeprefix("text_model."))), tensor), key


def test_t5_tokenizer_knows_words_and_ends(tiny_flux, tiny_flux_folder):
    tokenizer = tiny_flux.tokenizer_2
    ids = tokenizer("the red cat", padding="max_length", max_length=8).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁the", "▁red", "▁cat", "</s>", *["<pad>"] * 4]
    assert '"T5TokenizerFast"' in (tiny_flux_folder / "model_index.json").read_text()
