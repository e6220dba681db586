"""The training steps that `train_step.py` compares: this package's, and the same chain written with diffusers.

One process holds one model. The variants take turns with its weights, adapters, reward and optimizer. The package's ops
are put in for its own step and taken out for the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from alignprop_fast import DifferentiableSampler
from alignprop_fast.models.architectures import architecture
from alignprop_fast.models.conditioning import Conditioning
from alignprop_fast.models.lean.surgery import put_ops_in, take_ops_out
from alignprop_fast.rewards import Reward
from alignprop_fast.rewards.architectures import architecture_reward
from alignprop_fast.runtime import LiveBytes, counted_operator
from benchmarks.step.chain import PROMPTS

GUIDANCE = 5.0
ETA = 1.0
EAGER_WAYS = ("blocks", "steps and blocks")
"""Checkpoints: every block of the UNet; or every UNet call and, when it runs again, every block."""


class Bench:
    """A model with adapters, reward and optimizer on a device, and one training step of each variant.

    model: "sd15" or "sdxl": the published architecture, random weights in bf16, adapters of rank 16 in fp32. There are
    no text encoders, because a trainer that caches embeddings frees them. "small" is for a dry run in fp32.
    reward: a name of `architecture_reward`, or "mean" of the image, which costs nothing.
    """

    def __init__(self, model: str, device: torch.device, steps: int, reward: str, compiled: str = "blocks"):
        self.model, self.device, self.steps, self.compiled = model, device, steps, compiled
        if model == "small":
            self.pipe, self.dtype = small_pipeline().to(device), torch.float32
        else:
            self.pipe, self.dtype = architecture(model, device=device).pipe, torch.bfloat16
            encoders = [name for name in self.pipe.components if name.startswith("text_encoder")]
            self.pipe.register_modules(**dict.fromkeys(encoders))
        self.unet, self.vae = self.pipe.unet, self.pipe.vae
        named = reward != "mean"
        self.reward: Reward = architecture_reward(reward, self.dtype, device=device) if named else MeanReward()
        self.reward_bytes = self.reward.weight_bytes()
        self.sampler = DifferentiableSampler(self.pipe, steps, GUIDANCE, ETA, None, reward=self.reward)
        self._conditioning: dict[int, Conditioning] = {}
        # Replaces the text encoders.
        vars(self.sampler.model)["encode"] = lambda batch: self.conditioning(len(batch.prompts))
        self.trained = self.sampler.model.trainable()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self._stock = False
        self._compiled_calls: dict[Any, Any] = {}

    def conditioning(self, batch: int) -> Conditioning:
        """Random embeddings of B prompts for both branches; on zeros a GPU draws less power and runs faster."""
        if batch not in self._conditioning:
            blank = self.sampler.model.blank_conditioning(batch, True, self.sampler.size)
            added = None
            if blank.added is not None:
                added = {**blank.added, "text_embeds": torch.randn_like(blank.added["text_embeds"])}
            self._conditioning[batch] = replace(blank, embeds=torch.randn_like(blank.embeds), added=added)
        return self._conditioning[batch]

    def update(self, images: torch.Tensor, score: Callable[..., tuple[torch.Tensor, Any]]) -> None:
        """Reward, backward pass and optimizer."""
        scores, _ = score(images, prompts_of(len(images)), [{} for _ in images])
        (-scores.mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def ours(self, batch: int, grad_steps: int, budget_bytes: int) -> None:
        """One step of this package within the budget; afterwards `sampler.plan` is the plan."""
        self.use_stock(False)
        self.sampler.budget_bytes = budget_bytes
        images = self.sampler(prompts_of(batch), grad_steps=range(self.steps - grad_steps, self.steps))
        self.update(images, self.sampler.score)

    def eager(self, batch: int, grad_steps: int, way: str, compiled: bool = False) -> None:
        """One step of the chain written with diffusers and PEFT; `way` is one of EAGER_WAYS."""
        self.use_stock(True)
        self.compile(compiled)
        try:
            self.update(self._eager_images(batch, grad_steps, way), self.reward)
        finally:
            self.compile(False)

    def _eager_images(self, batch: int, grad_steps: int, way: str) -> torch.Tensor:
        cond, scheduler = self.conditioning(batch), self.pipe.scheduler
        scheduler.set_timesteps(self.steps)
        timesteps = scheduler.timesteps.to(self.device)
        call = partial(guided, self.unet, cond)
        x = self.sampler.model.initial_latents(batch, self.sampler.size, None, None)
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= self.steps - grad_steps):
                if way == "blocks" or not torch.is_grad_enabled():
                    y = call(x, timesteps[i])
                else:
                    y = checkpoint(call, x, timesteps[i], use_reentrant=False, preserve_rng_state=False)
            x = scheduler.step(y.float(), int(timestep), x, eta=ETA).prev_sample
        image = self.vae.decode((x / self.vae.config.scaling_factor).to(self.dtype), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def use_stock(self, stock: bool, checkpointed: bool = True) -> None:
        """Switch to diffusers' model with checkpointed blocks, or to the package's ops with channels_last weights."""
        for model in (self.unet, self.vae):
            checkpoints = stock and checkpointed
            (model.enable_gradient_checkpointing if checkpoints else model.disable_gradient_checkpointing)()
        if stock == self._stock:
            return
        self._stock = stock
        for module in (self.unet, self.vae.decoder):
            (take_ops_out if stock else put_ops_in)(module)
            module.to(memory_format=torch.contiguous_format if stock else torch.channels_last)

    def compile(self, on: bool) -> None:
        """Switch torch.compile of the transformer blocks, or of the whole UNet, on or off; compiled code is kept."""
        if on and not self._compiled_calls:
            blocks = [m for m in self.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
            for module in blocks if self.compiled == "blocks" else [self.unet]:
                module.compile()
                self._compiled_calls[module] = module._compiled_call_impl
        for module, call in self._compiled_calls.items():
            module._compiled_call_impl = call if on else None

    def flop(self) -> dict[str, float]:
        """FLOP for one image without recomputation: "forward" and "both" for a guided step, "decoder", "reward"."""
        model = self.sampler.model
        cond = model.blank_conditioning(1, True, self.sampler.size)
        x = torch.zeros(1, model.latent_channels, *(side // self.pipe.vae_scale_factor for side in self.sampler.size))
        x = x.to(self.device).requires_grad_()
        t = torch.zeros((), dtype=torch.long, device=self.device)
        images = torch.zeros(1, 3, *self.sampler.size, device=self.device).requires_grad_()

        def forward() -> None:
            with torch.inference_mode():
                model.predict(x, t, cond)

        def back(y: torch.Tensor, wanted: Sequence[torch.Tensor]) -> None:
            torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

        return {
            "forward": _flop(forward),
            "both": _flop(lambda: back(model.predict(x, t, cond), [x, *self.trained])),
            "decoder": _flop(lambda: back(model.decode(x), [x])),
            "reward": _flop(lambda: back(self.reward(images, prompts_of(1), [{}])[0], [images])),
        }


def small_pipeline() -> Any:
    """Stable Diffusion with UNet widths 32 and 64 and images of 16 x 16, fp32, random weights, on the CPU."""
    from diffusers import StableDiffusionPipeline

    from alignprop_fast.making.random_weights import make_folder
    from alignprop_fast.models.lora.adapters import add_lora

    with tempfile.TemporaryDirectory() as folder:
        pipe = StableDiffusionPipeline.from_pretrained(make_folder("sd", Path(folder) / "small"), local_files_only=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    add_lora(pipe, 4, 4)
    return pipe


class MeanReward(Reward):
    """The mean of each image: costs nothing."""

    by_image = True

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        return images.mean(dim=(1, 2, 3)), {}


def prompts_of(batch: int) -> list[str]:
    return [PROMPTS[i % len(PROMPTS)] for i in range(batch)]


def step_flop(flop: dict[str, float], batch: int, steps: int, grad_steps: int) -> float:
    """FLOP of one training step without recomputation, the least that every variant must do."""
    chain = (steps - grad_steps) * flop["forward"] + grad_steps * flop["both"]
    return batch * (chain + flop["decoder"] + flop["reward"])


def guided(unet: torch.nn.Module, cond: Conditioning, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    both = torch.cat([x] * 2).to(cond.embeds.dtype)
    added = None if cond.added is None else dict(cond.added)
    y = unet(both, timestep, cond.embeds, added_cond_kwargs=added, return_dict=False)[0]
    without, with_prompt = y.chunk(2)
    return without + GUIDANCE * (with_prompt - without)


def _flop(run: Callable[[], Any]) -> float:
    total = 0.0

    def add(func: Any, arguments: Any, out: Any, known: Any) -> None:
        nonlocal total
        counted = counted_operator(func, arguments, out)
        total += 0.0 if counted is None else counted.flop

    with LiveBytes(add):
        run()
    return total
