"""Distils the bundled text-to-image network to its twin, which draws in 4 steps without guidance.

The twin starts as the teacher's UNet and learns on its own chain of 4 DDIM steps, in two stages:

1. follow: each step should land where the guided teacher lands from the same latents with `SMALL_STEPS` smaller steps
   (progressive distillation, Salimans and Ho 2022, arXiv 2202.00512, here from the latents that the twin reaches).
2. match: the pictures at the end of the chain should be as likely as the teacher's, by distribution matching (Yin et
   al. 2024, arXiv 2311.18828, equation 7): a critic learns to denoise the twin's pictures, and the difference between
   what critic and guided teacher make of a noisy picture is its gradient, which runs back through all 4 steps.

Latents are x = signal * clean + noise_level * noise with signal = cos(a) and noise_level = sin(a); the networks predict
v = cos(a) * noise - sin(a) * clean, so that a DDIM step from angle a to b is x' = cos(a - b) x - sin(a - b) v.
"""

import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.making.loop import Modules, Settings, fit
from alignprop_fast.making.train_unet import PREVIEW_PROMPTS, draw, spread_timesteps, tokenize, with_parts

STEPS = 4
SMALL_STEPS = 3  # of the teacher, for each step of the twin
GUIDANCE_SCALE = 2.0  # of the teacher
MATCH_RANGE = (20, 980)  # timesteps at which critic and teacher look at a picture


def step_to(x_BCHW: Tensor, v_BCHW: Tensor, turn: Tensor) -> Tensor:
    """The DDIM step by the angle `turn`, [] or [B]."""
    turn = turn.reshape(-1, 1, 1, 1)
    return turn.cos() * x_BCHW - turn.sin() * v_BCHW


def velocity_to(x_BCHW: Tensor, there_BCHW: Tensor, turn: Tensor) -> Tensor:
    """The v with which `step_to(x, v, turn)` is `there`."""
    return (turn.cos() * x_BCHW - there_BCHW) / turn.sin()


class Distillation:
    """Losses of a twin that learns from a guided teacher.

    Args:
        pipe: the teacher, a `StableDiffusionPipeline` that predicts v.
        captions: what is drawn.
        batch_size: pictures per step.
    """

    def __init__(self, pipe: Any, captions: list[str], batch_size: int) -> None:
        self.teacher, self.text_encoder = pipe.unet, pipe.text_encoder
        self.tokens, self.empty = tokenize(pipe.tokenizer, captions), tokenize(pipe.tokenizer, [""])
        self.batch_size = batch_size
        self.shape = (batch_size, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
        # Angle 0 comes after the last timestep; index -1 finds it.
        alphas = torch.cat([pipe.scheduler.alphas_cumprod, torch.ones(1)])
        self.angles = alphas.clamp(0, 1).sqrt().arccos()
        self.count = len(alphas) - 1
        self.stride = self.count // STEPS
        self.timesteps = [self.count - 1 - self.stride * step for step in range(STEPS)]

    def draw_start(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise [B, C, H, W] and text embeddings of the captions and of none, [B, tokens, width] each."""
        index = torch.randint(len(self.tokens), (self.batch_size,), generator=generator)
        noise = torch.randn(self.shape, generator=generator)
        with torch.no_grad():
            text = self.text_encoder(torch.cat([self.tokens[index], self.empty]))[0]
        return noise, text[:-1], text[-1:].expand(self.batch_size, -1, -1)

    def turn(self, timestep: int, length: int) -> Tensor:
        """The angle of a step from this timestep down by `length`."""
        return self.angles[timestep] - self.angles[max(timestep - length, -1)]

    @torch.no_grad()
    def guided(self, x: Tensor, timesteps: Any, text: Tensor, empty: Tensor) -> Tensor:
        """The teacher's v with guidance. timesteps: a number or [B]."""
        if isinstance(timesteps, Tensor):
            timesteps = timesteps.repeat(2)
        with_text, without = self.teacher(x.repeat(2, 1, 1, 1), timesteps, torch.cat([text, empty])).sample.chunk(2)
        return without + GUIDANCE_SCALE * (with_text - without)

    def teacher_lands(self, x: Tensor, timestep: int, text: Tensor, empty: Tensor) -> Tensor:
        """Where the teacher gets from x with the small steps that make up one step of the twin."""
        places = [timestep - round(self.stride * part / SMALL_STEPS) for part in range(SMALL_STEPS + 1)]
        for now, then in pairwise(places):
            x = step_to(x, self.guided(x, now, text, empty), self.turn(now, now - then))
        return x

    def follow_loss(self, twin: Any, generator: torch.Generator) -> Tensor:
        """Mean squared error of the twin's v, over the four steps of its own chain."""
        x, text, empty = self.draw_start(generator)
        losses = []
        for timestep in self.timesteps:
            turn = self.turn(timestep, self.stride)
            v = twin(x, timestep, text).sample
            wanted = velocity_to(x, self.teacher_lands(x, timestep, text, empty), turn)
            losses.append((v - wanted).square().mean())
            x = step_to(x, v.detach(), turn)
        return torch.stack(losses).mean()

    def match_loss(self, twin: Any, critic: Any, generator: torch.Generator) -> Tensor:
        """A loss whose gradient is the twin's by distribution matching and the critic's by its denoising error."""
        x, text, empty = self.draw_start(generator)
        for timestep in self.timesteps:
            x = step_to(x, twin(x, timestep, text).sample, self.turn(timestep, self.stride))
        picture = x.detach()
        gradient = self.match_gradient(critic, picture, text, empty, generator)
        return (x * gradient).mean() + self.critic_loss(critic, picture, text, generator)

    @torch.no_grad()
    def match_gradient(self, critic: Any, picture: Tensor, text: Tensor, empty: Tensor, generator: Any) -> Tensor:
        """What critic and teacher make of the noisy picture: their difference, of about unit size per picture."""
        low, high = MATCH_RANGE
        timesteps = low + spread_timesteps(self.batch_size, high - low, generator)
        turn = self.angles[timesteps]
        noisy = self.noisy(picture, torch.randn(self.shape, generator=generator), turn)
        real = step_to(noisy, self.guided(noisy, timesteps, text, empty), turn)
        fake = step_to(noisy, critic(noisy, timesteps, text).sample, turn)
        return (fake - real) / (picture - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-3)

    def critic_loss(self, critic: Any, picture: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
        """Squared error of v on the twin's pictures."""
        timesteps = spread_timesteps(self.batch_size, self.count, generator)
        noise, turn = torch.randn(self.shape, generator=generator), self.angles[timesteps]
        # v is the noisy picture a quarter turn further on.
        v = self.noisy(picture, noise, turn + torch.pi / 2)
        return (critic(self.noisy(picture, noise, turn), timesteps, text).sample - v).square().mean()

    @staticmethod
    def noisy(picture: Tensor, noise: Tensor, angle_B: Tensor) -> Tensor:
        angle = angle_B.reshape(-1, 1, 1, 1)
        return angle.cos() * picture + angle.sin() * noise


@dataclass
class TwinTraining:
    """The two stages, each resumable from its checkpoint in `folder`."""

    pipe: Any
    captions: list[str]
    folder: Path
    seed: int

    def follow(self, settings: Settings) -> Any:
        """The averaged UNet after stage 1."""
        torch.manual_seed(self.seed)
        modules: Modules = {"unet": trainable(self.pipe.unet)}
        distillation = Distillation(self.pipe, self.captions, settings.batch_size)

        def loss_at(generator: torch.Generator) -> Tensor:
            return distillation.follow_loss(modules["unet"], generator)

        return self.fit(modules, loss_at, settings, "follow")

    def match(self, unet: Any, settings: Settings) -> Any:
        """The averaged UNet after stage 2. unet: of stage 1."""
        torch.manual_seed(self.seed)
        modules: Modules = {"unet": trainable(unet), "critic": trainable(self.pipe.unet)}
        distillation = Distillation(self.pipe, self.captions, settings.batch_size)

        def loss_at(generator: torch.Generator) -> Tensor:
            return distillation.match_loss(modules["unet"], modules["critic"], generator)

        return self.fit(modules, loss_at, settings, "match")

    def fit(self, modules: Modules, loss_at: Any, settings: Settings, stage: str) -> Any:
        averages = fit(modules, loss_at, settings, self.folder / f"{stage}.pt", self.seed, self.preview)
        return averages["unet"].to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def preview(self, step: int, averages: Modules) -> None:
        twin = with_parts(self.pipe, unet=averages["unet"])
        draw(twin, list(PREVIEW_PROMPTS), self.folder / "twin.png", STEPS, guidance_scale=1.0)


def trainable(network: Any) -> Any:
    """A copy that learns, in the memory format that is fastest on the CPU."""
    return copy.deepcopy(network).train().requires_grad_(True).to(memory_format=torch.channels_last)
