"""Distils the bundled text-to-image network to its twin, which draws in 4 steps without guidance.

The twin starts as the teacher's UNet and learns on its own chain of 4 DDIM steps: each step should land where the
guided teacher lands from the same latents with `SMALL_STEPS` smaller steps (progressive distillation, Salimans and Ho
2022, arXiv 2202.00512, here from the latents that the twin reaches).

Latents are x = signal * clean + noise_level * noise with signal = cos(a) and noise_level = sin(a); the networks predict
v = cos(a) * noise - sin(a) * clean, so that a DDIM step from angle a to b is x' = cos(a - b) x - sin(a - b) v.
"""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.making.loop import Modules, Settings, fit
from alignprop_fast.making.train_unet import PREVIEW_PROMPTS, draw, tokenize, with_parts

STEPS = 4
SMALL_STEPS = 3  # of the teacher, for each step of the twin
GUIDANCE_SCALE = 2.0  # of the teacher


def step_to(x_BCHW: Tensor, v_BCHW: Tensor, turn: Tensor) -> Tensor:
    """The DDIM step by the angle `turn`, [] or [B]."""
    turn = turn.reshape(-1, 1, 1, 1)
    return turn.cos() * x_BCHW - turn.sin() * v_BCHW


def velocity_to(x_BCHW: Tensor, there_BCHW: Tensor, turn: Tensor) -> Tensor:
    """The v with which `step_to(x, v, turn)` is `there`."""
    return (turn.cos() * x_BCHW - there_BCHW) / turn.sin()


class Distillation:
    """The loss of a twin that learns from a guided teacher.

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
    def guided(self, x: Tensor, timestep: int, text: Tensor, empty: Tensor) -> Tensor:
        """The teacher's v with guidance."""
        with_text, without = self.teacher(x.repeat(2, 1, 1, 1), timestep, torch.cat([text, empty])).sample.chunk(2)
        return without + GUIDANCE_SCALE * (with_text - without)

    def teacher_lands(self, x: Tensor, timestep: int, text: Tensor, empty: Tensor) -> Tensor:
        """Where the teacher gets from x with the small steps that make up one step of the twin."""
        places = [timestep - round(self.stride * part / SMALL_STEPS) for part in range(SMALL_STEPS + 1)]
        for now, then in pairwise(places):
            x = step_to(x, self.guided(x, now, text, empty), self.turn(now, now - then))
        return x

    def loss(self, twin: Any, generator: torch.Generator) -> Tensor:
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


def train_twin(pipe: Any, captions: list[str], settings: Settings, folder: Path, seed: int) -> Any:
    """The twin's averaged UNet, resumable from `twin.pt` in the folder; `twin.png` there is a preview."""
    torch.manual_seed(seed)
    modules: Modules = {"unet": trainable(pipe.unet)}
    distillation = Distillation(pipe, captions, settings.batch_size)

    def loss_at(generator: torch.Generator) -> Tensor:
        return distillation.loss(modules["unet"], generator)

    def preview(step: int, averages: Modules) -> None:
        twin = with_parts(pipe, unet=averages["unet"])
        draw(twin, list(PREVIEW_PROMPTS), folder / "twin.png", STEPS, guidance_scale=1.0)

    averages = fit(modules, loss_at, settings, folder / "twin.pt", seed, preview)
    return averages["unet"].to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def trainable(network: Any) -> Any:
    """A copy that learns, in the memory format that is fastest on the CPU."""
    return copy.deepcopy(network).train().requires_grad_(True).to(memory_format=torch.channels_last)
