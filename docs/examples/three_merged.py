"""Three adapters, each trained on a reward of its own, mixed into one.

    python docs/examples/three_merged.py three-run

Adapters mix linearly in the weight delta, so their weights can be chosen after training, without training again. The
mixture is made by the command `alignprop-fast merge A:0.4 B:0.3 C:0.3 --output-dir mixed`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch

from alignprop_fast import (
    AlignPropConfig,
    AlignPropTrainer,
    DefaultDDPOStableDiffusionPipeline,
    DifferentiableSampler,
)
from alignprop_fast.cli.app import app
from alignprop_fast.rewards import get_reward

PROMPTS = ["a red apple", "a cat", "three stars", "a house"]
WEIGHTS = {"clip": 0.4, "colorfulness": 0.3, "incompressibility": 0.3}


def draw_prompt() -> tuple[str, dict[str, Any]]:
    return random.choice(PROMPTS), {}


def train(reward: str, output_dir: Path, steps: int) -> None:
    """LoRA adapters of the bundled model that raise one reward."""
    config = AlignPropConfig(
        num_epochs=steps,
        sample_num_steps=4,
        train_batch_size=2,
        train_learning_rate=5e-3,
        truncation="last:1",
        mixed_precision="no",
        output_dir=str(output_dir),
    )
    trainer = AlignPropTrainer(config, get_reward(reward), draw_prompt, DefaultDDPOStableDiffusionPipeline("demo"))
    trainer.train()
    trainer.save_pretrained(output_dir)


def scores_of(lora: Path | None) -> dict[str, float]:
    """Mean of each reward over the prompts, on the same noise for every adapter; None: the base model."""
    pipe = DefaultDDPOStableDiffusionPipeline("demo").sd_pipeline
    if lora is not None:
        pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        images = DifferentiableSampler(pipe, 4)(PROMPTS, generator=torch.Generator().manual_seed(0))
        _, parts = get_reward(",".join(WEIGHTS))(images, PROMPTS, [{}] * len(PROMPTS))
    return {name: parts[name].mean().item() for name in WEIGHTS}


def main(output_dir: str, steps: int = 3) -> dict[str, dict[str, float]]:
    """Returns the rewards of the base model, of each adapter and of the mixture."""
    folder = Path(output_dir)
    for reward in WEIGHTS:
        train(reward, folder / reward, steps)
    mixture = [f"{folder / reward}:{weight}" for reward, weight in WEIGHTS.items()]
    app(["merge", *mixture, "--output-dir", str(folder / "mixed")], standalone_mode=False)
    found = {"base": scores_of(None)} | {name: scores_of(folder / name) for name in (*WEIGHTS, "mixed")}
    for name, scores in found.items():
        print(f"{name:18}", *(f"{reward} {score:8.3f}" for reward, score in scores.items()))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["three-merged"])
