"""Stable Diffusion 1.x and 2.x seen as a chain: text in, noise prediction per step, image out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.torch_utils import randn_tensor
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignprop_fast.models.surgery import put_ops_in

Generator = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser sees beside latents and time, for K branches (unconditional first): [K * B, ...] each."""

    embeds: torch.Tensor
    added: Mapping[str, torch.Tensor] | None
    branches: int


class StableDiffusionAdapter:
    """A diffusers pipeline as the sampler needs it. The pipeline stays an ordinary one.

    Freezes the decoder and the text encoders (only the denoiser's trainable parameters get gradients), lays the
    convolutions out channels_last and puts the frozen-aware ops in (`surgery.take_ops_out` takes them out); no name,
    value or adapter changes.

    Raises:
        ValueError: a scheduler or model option that the chain cannot reproduce; the message says how to change it.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self._check()
        for module in (pipe.vae, *self._text_encoders()):
            module.requires_grad_(False)
        for module in (pipe.unet, pipe.vae.decoder):
            # Convolutions only: linear layers have no memory format.
            module.to(memory_format=torch.channels_last)
            put_ops_in(module)

    def _text_encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    def _check(self) -> None:
        scheduler, unet = self.pipe.scheduler, self.pipe.unet
        if not isinstance(scheduler, DDIMScheduler):
            raise ValueError(
                f"{type(scheduler).__name__} is not supported: set pipe.scheduler = "
                "DDIMScheduler.from_config(pipe.scheduler.config)"
            )
        if scheduler.config.clip_sample or scheduler.config.thresholding:
            raise ValueError(
                "the scheduler clips its estimate of the image, which latent models must not do: set "
                "clip_sample=False and thresholding=False, e.g. DDIMScheduler.from_config(config, clip_sample=False)"
            )
        if unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "a UNet with embedded guidance (LCM) is not supported: use the model it was distilled from"
            )

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    @property
    def decoder(self) -> nn.Module:
        return self.pipe.vae

    @property
    def latent_channels(self) -> int:
        return self.pipe.unet.config.in_channels

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.pipe.unet.device

    def trainable(self) -> list[nn.Parameter]:
        """The denoiser's parameters that ask for a gradient.

        Raises:
            ValueError: active dropout, which would make a replayed step another than the one that was run.
        """
        if any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in self.denoiser.modules()):
            raise ValueError("dropout is on in the denoiser: set lora_dropout to 0, or call pipe.unet.eval()")
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    def has_adapters(self) -> bool:
        """Whether the denoiser is a base model with PEFT adapters on it."""
        return any(isinstance(module, BaseTunerLayer) for module in self.denoiser.modules())

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside the block the denoiser is the base model: PEFT's adapters are left out of every forward pass."""
        layers = [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]
        before = [layer.disable_adapters for layer in layers]
        try:
            for layer in layers:
                # The flag alone: `enable_adapters` also rewrites requires_grad, which a chain under way relies on.
                layer._disable_adapters = True
            yield
        finally:
            for layer, was_off in zip(layers, before, strict=True):
                layer._disable_adapters = was_off

    def modules(self) -> Sequence[nn.Module]:
        """Everything that holds weights while the chain runs."""
        return [self.pipe.unet, self.pipe.vae, *self._text_encoders()]

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, the model's own where None."""
        native = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        size = (height or native, width or native)
        if size[0] % 8 or size[1] % 8:
            raise ValueError(f"image size {size[0]} x {size[1]} is not a multiple of 8 pixels: round it")
        return size

    def schedule(self, num_inference_steps: int) -> dict[str, Any]:
        """Keyword arguments of `sampling.ddim_table` (all but eta) for a chain of that many steps."""
        config = self.pipe.scheduler.config
        if not 1 <= num_inference_steps <= config.num_train_timesteps:
            raise ValueError(f"{num_inference_steps} inference steps: use 1 to {config.num_train_timesteps}")
        scheduler = DDIMScheduler.from_config(config)
        scheduler.set_timesteps(num_inference_steps)
        return {
            "alphas_cumprod": scheduler.alphas_cumprod.tolist(),
            "final_alpha_cumprod": float(scheduler.final_alpha_cumprod),
            "timesteps": scheduler.timesteps.tolist(),
            "stride": config.num_train_timesteps // num_inference_steps,
            "prediction_type": config.prediction_type,
        }

    @torch.no_grad()
    def encode(
        self, prompts: list[str], negative_prompts: str | list[str] | None, guided: bool, size: tuple[int, int]
    ) -> Conditioning:
        """Text embeddings of B prompts; two branches if guided, else one. `size` in pixels conditions SDXL alone."""
        cond, uncond = self.pipe.encode_prompt(prompts, self.device, 1, guided, negative_prompts)
        return Conditioning(torch.cat([uncond, cond]) if guided else cond, None, 1 + guided)

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        """What `encode` gives for B prompts, in shape and dtype alone: to measure without text."""
        length, width = 77, self.pipe.unet.config.cross_attention_dim
        embeds = torch.zeros((1 + guided) * batch, length, width, dtype=self.dtype, device=self.device)
        return Conditioning(embeds, None, 1 + guided)

    def initial_latents(
        self, batch: int, size: tuple[int, int], generator: Generator, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, C, h, w] in fp32 (or wider): drawn as the pipeline draws them, or the given ones."""
        x = self.pipe.prepare_latents(batch, self.latent_channels, *size, self.dtype, self.device, generator, latents)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def noise(self, like: torch.Tensor, generator: Generator) -> torch.Tensor:
        """Unit noise in the shape of `like`, drawn as the scheduler draws it (in the model's dtype)."""
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=self.dtype)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Model output [K * B, C, h, w] at latents x [B, C, h, w], the same latents in every branch."""
        added = None if cond.added is None else dict(cond.added)
        x = torch.cat([x.to(self.dtype)] * cond.branches)
        return self.pipe.unet(x, timestep, cond.embeds, added_cond_kwargs=added, return_dict=False)[0]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32 (or wider), from latents [B, C, h, w]."""
        vae = self.pipe.vae
        image = vae.decode(self._unscaled(x).to(vae.dtype), return_dict=False)[0]
        return (image.to(x.dtype) / 2 + 0.5).clamp(0, 1)

    def _unscaled(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.pipe.vae.config.scaling_factor

    def step_groups(self) -> dict[str, list[nn.Module]]:
        """Modules of one denoising step that can be recomputed by themselves, by group."""
        return {
            "transformers": _instances(self.pipe.unet, (BasicTransformerBlock,)),
            "residuals": _instances(self.pipe.unet, (ResnetBlock2D,)),
        }

    def decoder_segments(self) -> dict[str, list[nn.Module]]:
        """Modules of the decoder that can be recomputed by themselves, by segment name."""
        return {"decoder": _instances(self.pipe.vae.decoder, (ResnetBlock2D, Upsample2D, Attention))}


def _instances(root: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    return [module for module in root.modules() if isinstance(module, kinds)]
