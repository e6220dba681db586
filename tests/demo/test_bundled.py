"""The bundled weights load with plain diffusers and transformers, are small, and do what the model card says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from alignprop_fast.demo import clip_path, counter_path, model_path, pictures_path
from alignprop_fast.models.lora.load_save import load_lora

WEIGHT_LIMIT_BYTES = 16_000_000  # with CLIP and the counter
PICTURE_LIMIT_BYTES = 10_000
NUM_STEPS, GUIDANCE_SCALE = 20, 4.0
VAE_ERROR_LIMIT = 0.03  # mean absolute error of pixels in [0, 1]
CLIP_ACCURACY = 0.75  # chance is 1/24


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(clip_path(), local_files_only=True).eval()
    return model, CLIPProcessor.from_pretrained(clip_path(), local_files_only=True)


@torch.no_grad()
def scores(clip, pictures: list[Image.Image], captions: list[str]) -> torch.Tensor:
    """Logits [pictures, captions]."""
    model, processor = clip
    return model(**processor(text=captions, images=pictures, padding=True, return_tensors="pt")).logits_per_image


def shipped_pictures() -> tuple[list[Image.Image], list[str]]:
    captions = json.loads((pictures_path() / "captions.json").read_text(encoding="utf-8"))
    return [Image.open(pictures_path() / name).convert("RGB") for name in captions], list(captions.values())


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_sizes():
    folders = (model_path(), clip_path(), counter_path())
    weights = [path for folder in folders for path in folder.rglob("*.safetensors")]
    assert len(weights) == 6
    assert sum(path.stat().st_size for path in weights) <= WEIGHT_LIMIT_BYTES
    assert max(path.stat().st_size for path in pictures_path().iterdir()) <= PICTURE_LIMIT_BYTES


def test_all_parts_load_in_one_precision(pipe):
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_every_caption_word_is_known_and_any_text_is_accepted(pipe):
    from alignprop_fast.demo.vocabulary import all_words

    for word in all_words():
        assert len(pipe.tokenizer(word).input_ids) == 3, word  # start, word, end
    unknown = pipe.tokenizer("Zebra, ünïcode!").input_ids
    assert max(unknown) < len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size
    assert unknown != pipe.tokenizer("Xebra, ünïcode!").input_ids


def test_vae_reconstructs_the_shipped_pictures(pipe):
    pictures = torch.stack([to_tensor(picture) for picture in shipped_pictures()[0]])
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(2 * pictures - 1).latent_dist.mean).sample / 2 + 0.5
    error = (decoded - pictures).abs().mean().item()
    assert error < VAE_ERROR_LIMIT


def test_the_pipeline_draws_what_it_is_told(pipe, clip):
    prompts = ["a red heart", "a panda", "a blue car", "a star on a black background"]
    generator = torch.Generator().manual_seed(0)
    pictures = pipe(prompts, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE_SCALE, generator=generator).images
    assert [picture.size for picture in pictures] == [(64, 64)] * len(prompts)
    best = scores(clip, pictures, prompts).argmax(1)
    assert best.tolist() == list(range(len(prompts)))


def test_clip_ranks_the_right_caption_first(clip):
    pictures, captions = shipped_pictures()
    best = scores(clip, pictures, captions).argmax(1)
    accuracy = (best == torch.arange(len(pictures))).float().mean().item()
    assert accuracy >= CLIP_ACCURACY


def test_adapters_of_the_model_of_before_are_told_to_be_so(pipe, tmp_path):
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # it was 112 wide
    factors = {f"{module}.lora_A.weight": torch.ones(2, 112), f"{module}.lora_B.weight": torch.ones(112, 2)}
    save_file(factors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="for the bundled model of before; train them again"):
        load_lora(pipe, tmp_path)


@pytest.mark.parametrize("folder", [model_path() / "tokenizer", clip_path()])
def test_the_tokenizer_is_the_one_that_the_code_builds(folder, tmp_path):
    """Token numbers must not change by the run: a model and another run's tokenizer would mix up words."""
    from alignprop_fast.making.networks import write_tokenizer

    write_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
