"""A few-step model: four denoising steps, no guidance, every step with gradient.

    python docs/examples/few_steps.py                            # the bundled few-step model
    python docs/examples/few_steps.py stabilityai/sdxl-turbo     # on a GPU

Models such as SDXL Turbo draw in one to four steps without classifier-free guidance. Their chain is so short that the
gradient can pass through all of it, so no truncation rule is needed. The loop below is plain PyTorch: the sampler gives
images with gradient, and any optimizer steps the adapters.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig

from alignprop_fast import DefaultDDPOStableDiffusionPipeline, DifferentiableSampler
from alignprop_fast.rewards import get_reward

PROMPTS = ["a red apple", "a cat"]


def main(model: str = "demo-twin", steps: int = 3) -> list[float]:
    """Train for so many optimizer steps on the same noise; returns the mean reward of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scheduler = "ddim" if model == "demo-twin" else "euler-ancestral"  # as the model was distilled
    pipe = DefaultDDPOStableDiffusionPipeline(model, scheduler=scheduler).sd_pipeline.to(device)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    sampler = DifferentiableSampler(pipe, num_inference_steps=4, guidance_scale=1.0)
    reward = get_reward("colorfulness", device=device)
    optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=3e-3)
    rewards = []
    for step in range(steps):
        images = sampler(PROMPTS, generator=torch.Generator().manual_seed(0))  # all four steps carry gradient
        scores, _ = reward(images, PROMPTS, [{}, {}])
        (-scores.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(scores.mean().item())
        print(f"step {step + 1}: reward {rewards[-1]:.2f}")
    return rewards


if __name__ == "__main__":
    main(*sys.argv[1:2])
