"""A trainer of a tiny model, with a reward and prompts."""

import random

import torch

from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.trainer import AlignPropTrainer

PROMPTS = ("the red cat", "a dog", "the cat and the dog")


def draw_prompt():
    return random.choice(PROMPTS), {"drawn": True}


def ramp_reward(images_BCHW, prompts, metadata):
    """Smooth and different for every pixel: minus the squared distance to a ramp."""
    ramp_W = torch.linspace(0, 1, images_BCHW.shape[-1])
    scores = -((images_BCHW - ramp_W) ** 2).mean(dim=(1, 2, 3))
    return scores, {"left": scores.detach() * 2, "note": "not a number"}


def make_config(tmp_path, **options):
    defaults = {
        "mixed_precision": "no",
        "sample_num_steps": 3,
        "train_batch_size": 2,
        "truncated_rand_backprop_minmax": (0, 3),
        "num_epochs": 3,
        "save_freq": 1000,
        "output_dir": str(tmp_path / "run"),
    }
    return AlignPropConfig(**{**defaults, **options})


def make_trainer(folder, config, reward=ramp_reward, use_lora=True, hook=None):
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=use_lora)
    return AlignPropTrainer(config, reward, draw_prompt, pipeline, hook)


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.trainable_layers]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
