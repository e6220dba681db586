"""The tiny folders are what they claim to be: loadable, deterministic, named as the published models are."""

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
