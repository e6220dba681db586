"""Counting and removing: the formula, the bundled counter, and OWL-ViT and OWLv2 against transformers' pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from alignprop_fast.demo import counter_path, pictures_path
from alignprop_fast.demo.vocabulary import COUNT_WORDS, THINGS
from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.count import log_soft_count
from alignprop_fast.rewards.detectors import OWLVIT_DEFAULTS, load_detector, log_same_boxes
from alignprop_fast.rewards.preprocess import Preprocess
from alignprop_fast.rewards.preprocess_owlv2 import Owlv2Preprocess

ONE = ([""], [None])


def count_of_boxes(logits: list[float], boxes: list[tuple[float, ...]]) -> float:
    return log_soft_count(torch.tensor([logits]), log_same_boxes(torch.tensor([boxes]))).exp().item()


def test_each_thing_counts_once_however_many_boxes_it_has():
    left, right = (0.2, 0.5, 0.2, 0.3), (0.7, 0.5, 0.2, 0.3)
    near = (0.21, 0.5, 0.2, 0.3)  # overlaps `left` by 0.9
    sure, absent = 6.0, -6.0
    assert count_of_boxes([sure], [left]) == pytest.approx(1, abs=1e-3)
    assert count_of_boxes([sure] * 3, [left, near, left]) == pytest.approx(1, abs=1e-2)
    assert count_of_boxes([sure] * 4, [left, near, left, right]) == pytest.approx(2, abs=1e-2)
    assert count_of_boxes([absent] * 4, [left, near, left, right]) == pytest.approx(0, abs=1e-2)
    # 250 faint boxes on top of an object do not change its count.
    assert count_of_boxes([sure] + [-4.0] * 250, [left] * 251) == pytest.approx(1, abs=1e-2)
    # A probability of one half counts as half an object, for every number of boxes.
    assert count_of_boxes([0.0], [left]) == pytest.approx(0.5, abs=1e-6)
    assert count_of_boxes([0.0] * 5, [left] * 5) == pytest.approx(0.5, abs=1e-3)


def test_gradient_of_the_formula_is_that_of_finite_differences():
    torch.manual_seed(0)
    margins = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(2, 7, 4, dtype=torch.float64) * 0.4 + 0.2
    assert torch.autograd.gradcheck(lambda m: log_soft_count(m, log_same_boxes(boxes)), margins)
    assert torch.autograd.gradcheck(lambda m: log_soft_count(m, None), margins)


def _things(caption: str) -> dict[str, int]:
    """Nouns and their numbers in a caption such as "a dog and two red cars on a blue background"."""
    counts, number = {}, 0
    words = {word: size for size, word in COUNT_WORDS.items()} | {"a": 1, "an": 1}
    nouns = {name: thing.noun for thing in THINGS for name in (thing.noun, thing.plural)}
    for word in caption.split(" on a ")[0].split():
        number = words.get(word, number)
        if word in nouns:
            counts[nouns[word]] = number
    return counts


def test_the_bundled_counter_counts_pictures_it_was_not_trained_on(pictures):
    captions = list(json.loads((pictures_path() / "captions.json").read_text(encoding="utf-8")).values())
    images = pictures("demo", 64)
    right, known = 0, json.loads((counter_path() / "config.json").read_text())["classes"]
    found = torch.stack(
        [get_reward(f"remove:{kind}")(images, [""] * 24, [None] * 24)[1]["soft_count"] for kind in known], 1
    )
    for caption, counts in zip(captions, found, strict=True):
        wanted = torch.tensor([_things(caption).get(kind, 0) for kind in known])
        right += bool((counts.round() == wanted).all())
    assert right >= 23, right  # 0.99 of a thousand others


def test_scores_of_the_bundled_counter(pictures):
    captions = list(json.loads((pictures_path() / "captions.json").read_text(encoding="utf-8")).values())
    images = pictures("demo", 64)
    index = next(i for i, caption in enumerate(captions) if caption.startswith("three") and "apples" in caption)
    image = images[index][None]
    scores = {spec: get_reward(spec)(image, *ONE)[0].item() for spec in ("count:apple=3", "count:apple=1")}
    assert -0.01 < scores["count:apple=3"] <= 0
    assert scores["count:apple=1"] == pytest.approx(np.log(3) + 1 - 3, abs=0.1)
    present, absent = (get_reward(f"remove:{kind}")(image, *ONE)[0].item() for kind in ("apple", "cat"))
    assert present < -3 and -0.5 < absent <= 0


@pytest.mark.parametrize(("spec", "wanted"), [("count:apple=3", 3), ("count:house=2", 2), ("remove:{own}", 0)])
def test_the_gradient_leads_to_the_count(pictures, spec, wanted):
    """Ascent along the gradient's sign, from pictures with and without objects. The step is halved whenever it was too
    long, so the end depends neither on its first length nor on rounding. No weight gets a gradient."""
    captions = list(json.loads((pictures_path() / "captions.json").read_text(encoding="utf-8")).values())
    for index in (0, 2):
        reward = get_reward(spec.format(own=next(iter(_things(captions[index])))))
        image = F.interpolate(pictures("demo", 64)[index][None], size=96, mode="bilinear")
        score, gradient, count = _score_and_gradient(reward, image)
        assert abs(count - wanted) > 0.9
        step = 0.02
        for _ in range(40):
            ahead = (image + step * gradient.sign()).clamp(0, 1)
            found = _score_and_gradient(reward, ahead)
            if found[0] > score:
                image, (score, gradient, count) = ahead, found
            else:
                step /= 2
        assert abs(count - wanted) < 0.5  # 0.06 from six neighbours of each picture within 0.01, after 30 steps
        assert not any(parameter.requires_grad for part in reward.parts for parameter in part.reward.parameters())


@pytest.mark.parametrize("spec", ["count:apple=3", "count:house=2", "remove:car"])
def test_the_counters_gradient_is_that_of_finite_differences_and_bf16_keeps_its_direction(pictures, spec):
    # A car, away from black and white, where the preprocessing clamps.
    image = 0.05 + 0.9 * F.interpolate(pictures("demo", 64)[:1], size=96, mode="bilinear").double()
    exact, half = (get_reward(spec, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    score, gradient, _ = _score_and_gradient(exact, image)
    # Not along the gradient, where a missing part of it would not show.
    direction = torch.nn.init.normal_(torch.empty_like(image), generator=torch.Generator().manual_seed(0))
    direction /= direction.norm()
    with torch.no_grad():
        ahead, behind = (exact(image + sign * 1e-4 * direction, *ONE)[0].item() for sign in (1, -1))
    assert (ahead - behind) / 2e-4 == pytest.approx((gradient * direction).sum().item(), rel=1e-4)
    half_score, half_gradient, _ = _score_and_gradient(half, image.float())
    assert half_score == pytest.approx(score, rel=0.02)
    # 0.9995 was the least on a hundred pictures between these and full counts: weights and activations are rounded by
    # 2^-9 through some 15 layers.
    assert F.cosine_similarity(half_gradient.double().flatten(), gradient.flatten(), 0) > 0.99


def _score_and_gradient(reward, image: Tensor) -> tuple[float, Tensor, float]:
    image = image.detach().requires_grad_()
    scores, info = reward(image, *ONE)
    return scores.item(), *torch.autograd.grad(scores.sum(), image), info["soft_count"].item()


@pytest.fixture(scope="module", params=["owlvit", "owlv2"])
def detector_folder(request, tmp_path_factory, tiny_sd_folder) -> Path:
    """An OWL-ViT or OWLv2 folder as published, small, random weights: 64 x 64 pixels, patches of 16."""
    import transformers

    folder = tmp_path_factory.mktemp("detectors") / request.param
    shutil.copytree(tiny_sd_folder / "tokenizer", folder)
    text = json.loads((tiny_sd_folder / "text_encoder" / "config.json").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": text["vocab_size"], "max_position_embeddings": 16}
    vision = sizes | {"image_size": 64, "patch_size": 16}
    kind = {"owlvit": "OwlViT", "owlv2": "Owlv2"}[request.param]
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForObjectDetection")(config)
        for parameter in model.parameters():  # the library's first weights are so small that nothing depends on pixels
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.8 / parameter[0].numel() ** 0.5)
        model.save_pretrained(folder)
    processor = {"size": {"height": 64, "width": 64}, "image_processor_type": f"{kind}ImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_margins_are_the_librarys_logits(detector_folder, pictures):
    from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

    images = pictures("photos", 64)[:2]
    detector = load_detector(detector_folder, "cat")
    margins, log_same = detector.candidates(images)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(detector_folder).eval()
    tokens = AutoTokenizer.from_pretrained(detector_folder)(
        ["a photo of a cat"] * 2, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**tokens, pixel_values=detector.preprocess(images))
    logits, order = output.logits.squeeze(-1).sort(1, descending=True)
    # A score of 0.1, the library's threshold, is a margin of zero.
    torch.testing.assert_close(torch.sigmoid(margins - np.log(9)), torch.sigmoid(logits), rtol=0, atol=1e-5)
    boxes = torch.gather(output.pred_boxes, 1, order[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(log_same, log_same_boxes(boxes), rtol=1e-3, atol=1e-3)
    assert logits.std(1).min() > 1e-3


def test_gradient_reaches_the_images_through_a_detector(detector_folder, pictures):
    reward = get_reward("count:cat=2", model=detector_folder)
    (module,) = (part.reward.double() for part in reward.parts)
    images = pictures("photos", 64)[:2].double().requires_grad_()
    arguments = (["", ""], [None, None])
    module(images, *arguments)[0].sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    direction = images.grad / images.grad.norm()
    # The boxes also move with the pixels, but the gradient leaves them out on purpose, so hold them fixed.
    margins = lambda x: module.detector.candidates(x)[0]  # noqa: E731
    same = module.detector.candidates(images.detach())[1]
    value = lambda x: 2 * (n := log_soft_count(margins(x), same)) - n.exp()  # noqa: E731
    with torch.no_grad():
        ahead, behind = (value(images + sign * 3e-4 * direction).sum() for sign in (1, -1))
    assert ((ahead - behind) / 6e-4).item() == pytest.approx(images.grad.norm().item(), rel=5e-3)


def test_detectors_run_in_half_precision_and_twice_the_same(detector_folder, pictures):
    images = pictures("photos", 64)[:2].requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        for _ in range(2):
            scores, info = get_reward("remove:cat", model=detector_folder, dtype=dtype)(images, ["", ""], [None, None])
            runs.append((scores, info["soft_count"], *torch.autograd.grad(scores.sum(), images)))
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
        assert runs[0][0].dtype == torch.float32 and runs[0][2].isfinite().all() and runs[0][2].abs().max() > 0


def test_other_models_are_refused(tmp_path, clip_folder):
    with pytest.raises(ValueError, match="model of type 'clip'; give an OWL-ViT or OWLv2 folder"):
        get_reward("count:cat=1", model=clip_folder)
    shutil.copytree(counter_path(), tmp_path / "counter")
    (tmp_path / "counter" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(OSError, match=r"cannot load the counter in .*is damaged") as caught:
        get_reward("count:cat=1", model=tmp_path / "counter")
    assert "\n" not in str(caught.value)


OWN_DETECTOR = """
import torch

class Bright(torch.nn.Module):
    def candidates(self, images):
        return (images.mean(1).flatten(1) - 0.5) * 40, None

def bright(kind):
    assert kind == "lamp post"
    return Bright()

def nothing(kind):
    return 3
"""


def test_a_detector_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_detector.py").write_text(OWN_DETECTOR)
    monkeypatch.chdir(tmp_path)
    image = torch.zeros(1, 3, 4, 4)
    image[..., 1, :3] = 1
    for spec, score in (("count:lamp post=3", 0.0), ("remove:lamp post", -20 - np.log(3))):
        scores, info = get_reward(spec, model="my_detector:bright")(image.requires_grad_(), *ONE)
        assert info["soft_count"].item() == pytest.approx(3, abs=1e-5)
        assert scores.item() == pytest.approx(score, abs=1e-5)
    scores.sum().backward()
    assert image.grad.abs().sum() > 0
    for model, message in (
        ("my_detector:nothing", "returned a int: return a detector with `candidates`"),
        ("my_detector:other", "detector 'my_detector:other': 'other' does not exist in"),
        ("no_such_module:load", "detector 'no_such_module:load': no module 'no_such_module' in"),
    ):
        with pytest.raises(ValueError, match=message):
            get_reward("count:lamp post=3", model=f"count={model}")


def _processed(processor, images_BCHW: Tensor) -> Tensor:
    pictures = (images_BCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]


def test_owlvit_pixels_equal_the_processors(pictures, tmp_path):
    from transformers import OwlViTImageProcessor

    (tmp_path / "preprocessor_config.json").write_text("{}")
    preprocess = Preprocess.from_folder(tmp_path, OWLVIT_DEFAULTS)
    images = pictures("photos", 256)[:3, :, :180]
    found, expected = preprocess(images), _processed(OwlViTImageProcessor(), images)
    assert found.shape[-2:] == (768, 768)
    difference = (found - expected) * torch.tensor(preprocess.std)[:, None, None]
    # The processor rounds to 8 bits after each of its two passes: see the CLIP tests.
    assert difference.abs().max() <= (0.5 + 0.5 * 1.3) / 255 + 1e-5
    assert difference.mean().abs() < 1e-3


@pytest.mark.parametrize("size", [48, 100, 256])
def test_owlv2_pixels_equal_the_processors(pictures, size):
    pytest.importorskip("scipy", reason="the processor resizes by scipy, which is not installed")
    import transformers

    processor_class = getattr(transformers, "Owlv2ImageProcessorPil", None) or transformers.Owlv2ImageProcessor
    images = pictures("photos", 256)[:3, :, :180]
    expected = _processed(processor_class(size={"height": size, "width": size}), images)
    preprocess = Owlv2Preprocess((size, size))
    difference = (preprocess(images) - expected) * torch.tensor(preprocess.std)[:, None, None]
    assert difference.abs().max() < 1e-3  # nothing is rounded on the way


def test_owlv2_resize_by_hand():
    """Twice as many pixels: linear interpolation at quarters, mirrored beyond the outermost; black makes the square."""
    preprocess = Owlv2Preprocess((4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    found = preprocess(torch.tensor([[0.2, 1.0]]).expand(1, 3, 1, 2))
    row = torch.tensor([0.2 + 0.25 * 0.8, 0.2 + 0.25 * 0.8, 1 - 0.25 * 0.8, 1 - 0.25 * 0.8])
    torch.testing.assert_close(found, (torch.tensor([0.75, 0.75, 0.25, 0.25])[:, None] * row).expand(1, 3, 4, 4))


def test_owlv2_shrinking_keeps_what_is_constant():
    found = Owlv2Preprocess((20, 20), mean=(0.0,) * 3, std=(1.0,) * 3)(torch.full((1, 3, 90, 90), 0.3))
    torch.testing.assert_close(found, torch.full((1, 3, 20, 20), 0.3))


def test_owlv2_shrinking_blurs_by_the_scale():
    """One bright pixel, four times fewer: a Gaussian of deviation (4 - 1) / 2, read half-way between two pixels."""
    image = torch.zeros(1, 3, 40, 40)
    image[..., 20, 17] = 1
    found = Owlv2Preprocess((10, 10), mean=(0.0,) * 3, std=(1.0,) * 3)(image)
    offsets = np.arange(-6, 7)  # four deviations
    total = np.exp(-0.5 * (offsets / 1.5) ** 2).sum()

    def along(bright: int) -> np.ndarray:
        distance = 4 * np.arange(10)[:, None] + [1, 2] - bright
        return np.where(abs(distance) <= 6, np.exp(-0.5 * (distance / 1.5) ** 2) / total, 0).mean(1)

    np.testing.assert_allclose(found[0, 0].numpy(), np.outer(along(20), along(17)), rtol=0, atol=1e-6)
