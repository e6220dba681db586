"""Trains the bundled UNet and its text encoder on encoded pictures, by the squared error of v.

v = signal * noise - noise_level * clean (Salimans and Ho 2022, arXiv 2202.00512).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.making.loop import Settings, fit
from alignprop_fast.making.networks import build_scheduler, build_text_encoder, build_unet
from alignprop_fast.making.scenes import save_grid

CAPTION_DROPOUT = 0.1  # share of captions replaced by "", for classifier-free guidance
PREVIEW_PROMPTS = (
    "a red apple",
    "a cat",
    "a dog",
    "a house",
    "two cats",
    "three stars on a blue background",
    "four fish",
    "a blue car",
    "a dog and a red car",
    "a strawberry",
    "three red hearts",
    "a panda on a yellow background",
    "two boats on a pink background",
    "a frog",
    "four mushrooms on a green background",
    "a tree and a sun",
)


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """Token ids [N, tokenizer.model_max_length]."""
    padded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return padded.input_ids


def build_pipeline(modules: dict, vae, tokenizer):
    """A `StableDiffusionPipeline` of `modules["unet"]`, `modules["text_encoder"]` and the given parts."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=tokenizer,
        unet=modules["unet"],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_parts(pipe: Any, **parts: Any) -> Any:
    """The pipeline with other parts."""
    from diffusers import StableDiffusionPipeline

    other = StableDiffusionPipeline(**{**pipe.components, **parts}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def spread_timesteps(number: int, count: int, generator: torch.Generator) -> Tensor:
    """`number` timesteps below `count`, one from each of as many equal ranges (Kingma et al. 2021, arXiv 2107.00630).

    Each is uniform by itself, and together they leave no noise level out, which steadies the loss.
    """
    places = (torch.arange(number) + torch.rand(number, generator=generator)) / number
    return (places * count).long().clamp(max=count - 1)


def train_unet(latents: Tensor, captions: list[str], vae, tokenizer, settings: Settings, folder: Path, seed: int):
    """Trains on unscaled latents [N, C, H, W]; returns the pipeline with averaged weights.

    A preview grid `unet.png` is drawn at every fourth checkpoint.
    """
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(seed)
    modules = {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
    modules["unet"].set_attn_processor(AttnProcessor())  # on the CPU the fused attention has a slow backward
    modules["unet"].to(memory_format=torch.channels_last)  # a quarter less time per step
    scheduler = build_scheduler()
    tokens, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    size = settings.batch_size

    def loss_at(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (size,), generator=generator)
        clean = latents[index] * vae.config.scaling_factor
        dropped = torch.rand(size, 1, generator=generator) < CAPTION_DROPOUT
        timesteps = spread_timesteps(size, len(scheduler.alphas_cumprod), generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy, velocity = (f(clean, noise, timesteps) for f in (scheduler.add_noise, scheduler.get_velocity))
        text = modules["text_encoder"](torch.where(dropped, empty, tokens[index]))[0]
        return (modules["unet"](noisy, timesteps, text).sample - velocity).square().mean()

    def on_checkpoint(step: int, averages: dict) -> None:
        if step // settings.checkpoint_every % 4 == 0 or step == settings.steps:
            draw(build_pipeline(averages, vae, tokenizer), list(PREVIEW_PROMPTS), folder / "unet.png")

    averages = fit(modules, loss_at, settings, folder / "unet.pt", seed, on_checkpoint)
    averages["unet"].to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return build_pipeline(averages, vae, tokenizer)


def draw(pipe, prompts: list[str], path: Path, num_inference_steps: int = 30, guidance_scale: float = 4.0) -> None:
    """Writes a grid of one picture per prompt."""
    generator = torch.Generator().manual_seed(0)
    pictures = pipe(
        prompts,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generator,
        output_type="pt",
    ).images
    save_grid(pictures, path, columns=16)
