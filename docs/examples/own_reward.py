"""A reward of your own: three steps on the bundled model, about ten seconds on one core.

    python docs/examples/own_reward.py warm-run

The same function works on the command line, from the folder that holds this file:

    alignprop-fast train --reward own_reward:warmth --output-dir warm-run
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import torch

from alignprop_fast import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

PROMPTS = ("a red apple", "a cat", "three stars")


def warmth(
    images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """How much redder than blue each picture is.

    images: [B, 3, H, W] in [0, 1], with gradient. Returns one score per picture, [B], and parts that are logged.
    """
    red, blue = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
    return red - blue, {"red": red, "blue": blue}


def draw_prompt() -> tuple[str, dict[str, Any]]:
    """A prompt and its metadata, which reaches the reward."""
    return random.choice(PROMPTS), {}


def main(output_dir: str, steps: int = 3) -> list[float]:
    """Train for so many steps; returns the mean reward of each."""
    config = AlignPropConfig(
        num_epochs=steps,
        sample_num_steps=6,
        train_batch_size=2,
        train_learning_rate=5e-3,
        truncation="last:2",
        mixed_precision="no",
        output_dir=output_dir,
    )
    trainer = AlignPropTrainer(config, warmth, draw_prompt, DefaultDDPOStableDiffusionPipeline("demo"))
    rewards = []
    for metrics in trainer.steps():
        print(f"step {metrics.step}: reward {metrics.reward_mean:.3f}, parts {metrics.reward_parts}")
        rewards.append(metrics.reward_mean)
    trainer.save_pretrained(output_dir)  # pytorch_lora_weights.safetensors, and the model beside it
    return rewards


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["own-reward"])
