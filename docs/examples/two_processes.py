"""Two processes, one model: each draws and scores its own pictures, and the gradients are averaged.

    torchrun --nproc-per-node 2 docs/examples/two_processes.py two-run           # on the CPU
    accelerate launch --num_processes 2 docs/examples/two_processes.py two-run   # on two GPUs

An optimizer step here sees 2 processes x 1 picture. The first process alone writes files.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from alignprop_fast import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
from alignprop_fast.rewards import get_reward

PROMPTS = ("a red apple", "a cat", "three stars")


def draw_prompt() -> tuple[str, dict[str, Any]]:
    return random.choice(PROMPTS), {}


def main(output_dir: str, steps: int = 2) -> None:
    config = AlignPropConfig(
        num_epochs=steps,
        sample_num_steps=3,
        train_batch_size=1,  # per process
        truncation="last:1",
        mixed_precision="no",
        output_dir=output_dir,
        accelerator_kwargs={"cpu": not torch.cuda.is_available()},  # without it processes on the CPU do not meet
    )
    pipeline = DefaultDDPOStableDiffusionPipeline("demo")
    trainer = AlignPropTrainer(config, get_reward("colorfulness"), draw_prompt, pipeline)
    for metrics in trainer.steps():
        if trainer.accelerator.is_main_process:
            processes = trainer.accelerator.num_processes
            print(f"step {metrics.step}: reward {metrics.reward_mean:.3f}, the mean over {processes} processes")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["two-processes"])
