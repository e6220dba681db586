"""The CLIP reward against transformers' own processor and model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignprop_fast.demo import pictures_path
from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.clip import ClipScore
from alignprop_fast.rewards.preprocess import Preprocess

from .published import write_preprocessor

PROMPTS = ["red cat", "a dog, drawn", "red cat", "the " * 200]


def reference_pixels(folder: Path, images_BCHW: torch.Tensor) -> torch.Tensor:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(folder)
    pictures = (images_BCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]


def test_pixels_without_resizing_equal_the_processors(pictures, tmp_path):
    write_preprocessor(tmp_path, size=64, crop_size={"height": 48, "width": 50})
    images = pictures("demo", 64)
    found = Preprocess.from_folder(tmp_path)(images)
    torch.testing.assert_close(found, reference_pixels(tmp_path, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("shape", [(256, 256), (171, 256), (256, 128), (40, 61)])
def test_pixels_after_resizing_equal_the_processors(pictures, tmp_path, shape, resample):
    write_preprocessor(tmp_path, size={"shortest_edge": 48}, crop_size=48, resample=resample)
    images = pictures("photos", 256)[:, :, : shape[0], : shape[1]]
    found, expected = Preprocess.from_folder(tmp_path)(images), reference_pixels(tmp_path, images)
    std = torch.tensor(Preprocess.from_folder(tmp_path).std)[:, None, None]
    difference = (found - expected) * std  # back to [0, 1]
    # The processor rounds to 8 bits after each of its two passes, with errors of up to half a level and no bias.
    # Bicubic's negative lobes amplify the first error by up to 1.3. The next test compares without rounding.
    assert difference.abs().max() <= (0.5 + 0.5 * 1.3) / 255 + 1e-5
    assert difference.mean().abs() < 1e-3


def test_resizing_equals_pil_where_pil_does_not_round(pictures, tmp_path):
    write_preprocessor(tmp_path, size=48, do_center_crop=False, do_normalize=False)
    images = pictures("photos", 256)[:, :, :200]
    found = Preprocess.from_folder(tmp_path)(images).numpy()
    planes = images.flatten(0, 1).numpy()
    for size in ((61, 200), (61, 48)):  # one direction at a time, clipped as 8-bit pictures are
        resized = [Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC) for plane in planes]
        planes = np.stack(resized).clip(0, 1)
    np.testing.assert_allclose(found.reshape(-1, 48, 61), planes, rtol=0, atol=1e-5)  # fp32 sums over some 25 pixels


def test_scores_equal_the_models_own(clip_folder, pictures):
    from transformers import AutoTokenizer, CLIPModel

    images = pictures("demo", 64)[:4]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        pixels = Preprocess.from_folder(clip_folder)(images)
        output = model(**tokens, pixel_values=pixels)
    expected = (output.logits_per_image / model.logit_scale.exp()).diagonal()
    scores, info = get_reward("clip", model=clip_folder)(images, PROMPTS, [None] * 4)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert scores.abs().max() <= 1
    assert torch.equal(info["clip"], scores)


def test_gradient_reaches_the_images_and_no_weight(clip_folder, pictures):
    reward = ClipScore(clip_folder)
    images = pictures("photos", 64)[:1].double().float().requires_grad_()
    reward(images, ["red cat"], [None])[0].sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in reward.parameters())
    # Against a central difference along the gradient; fp32 gives the score to about 1e-7, so 1e-2 of a 1e-3 step.
    direction = images.grad / images.grad.norm()
    with torch.no_grad():
        ahead, behind = (reward(images + sign * 0.05 * direction, ["red cat"], [None])[0] for sign in (1, -1))
    assert (ahead - behind).item() / 0.1 == pytest.approx(images.grad.norm().item(), rel=2e-2)


def test_text_is_embedded_once_and_serves_a_later_backward(clip_folder, pictures, monkeypatch):
    reward, images = ClipScore(clip_folder), pictures("demo", 64)[:4]
    calls = []
    hook = reward.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():  # as when the first pictures are drawn for show
        first, _ = reward(images, PROMPTS, [None] * 4)
    images = images.clone().requires_grad_()
    second, _ = reward(images, PROMPTS[::-1], [None] * 4)
    second.sum().backward()
    hook.remove()
    assert len(calls) == 1
    again, _ = reward(images, PROMPTS, [None] * 4)
    torch.testing.assert_close(first.clone(), again.detach(), rtol=0, atol=1e-6)


def test_bfloat16_images(clip_folder, pictures):
    reward, images = ClipScore(clip_folder), pictures("demo", 64)[:2].bfloat16()
    found, _ = reward(images, PROMPTS[:2], [None] * 2)
    expected, _ = reward(images.float(), PROMPTS[:2], [None] * 2)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_bundled_model_knows_the_demo_pictures(pictures):
    captions = list(json.loads((pictures_path() / "captions.json").read_text(encoding="utf-8")).values())
    images, reward = pictures("demo", 64), get_reward("clip")
    count = len(images)
    similarity = torch.stack([reward(images, [caption] * count, [None] * count)[0] for caption in captions], 1)
    own, others = similarity.diagonal(), similarity[~torch.eye(count, dtype=torch.bool)]
    assert own.mean() > others.mean() + 0.1
    assert (similarity.argmax(1) == torch.arange(count)).float().mean() > 0.5  # chance: 1 in 24


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _other_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "cl')


def _truncated_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _half_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("vision_model.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _broken_processor(folder: Path) -> None:
    write_preprocessor(folder, crop_size="large")


def _strange_filter(folder: Path) -> None:
    write_preprocessor(folder, resample=1)


def _no_tokenizer(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_no_folder, FileNotFoundError, "no CLIP model in"),
        (_other_kind, ValueError, "'bert', not 'clip'"),
        (_broken_config, ValueError, "is damaged"),
        (_truncated_weights, OSError, "copy the model again"),
        (_no_weights, OSError, "copy the model again"),
        (_half_the_weights, OSError, "lacks 3. weights"),
        (_no_processor, FileNotFoundError, "has no preprocessor_config.json"),
        (_broken_processor, ValueError, "is damaged or of an unknown kind"),
        (_strange_filter, ValueError, "neither 2 .bilinear. nor 3 .bicubic."),
        (_no_tokenizer, OSError, "copy the model again"),
    ],
)
def test_bad_folders_are_named_in_one_line(clip_folder, tmp_path, damage, error, message):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    damage(folder)
    with warnings.catch_warnings(), pytest.raises(error, match=message) as caught:
        warnings.simplefilter("ignore")
        get_reward("clip", model=folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_hub_id_is_taken_from_the_cache(clip_folder, tmp_path):
    """In its own process, because the Hub library reads its settings when imported. No network is used."""
    cached = tmp_path / "hub" / "models--owner--clip"
    shutil.copytree(clip_folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    code = (
        "import sys, torch; from alignprop_fast.rewards import get_reward\n"
        "grey = torch.full((1, 3, 64, 64), 0.5)\n"
        "try: print(get_reward('clip', model=sys.argv[1])(grey, ['red cat'], [None])[0].item())\n"
        "except OSError as error: print(error)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    found = [
        subprocess.run([sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, check=True)
        for name in ("owner/clip", "owner/none")
    ]
    expected = get_reward("clip", model=clip_folder)(torch.full((1, 3, 64, 64), 0.5), ["red cat"], [None])[0].item()
    assert float(found[0].stdout) == pytest.approx(expected, abs=1e-5)
    assert found[1].stdout.startswith("cannot get the CLIP model owner/none from the Hub: ")
    assert len(found[1].stdout.splitlines()) == 1
