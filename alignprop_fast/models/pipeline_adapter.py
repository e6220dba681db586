"""A diffusers pipeline as a chain: encode text, predict each step, decode the image. Shared by all models."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from alignprop_fast.models.conditioning import Conditioning, Embeddings, PromptBatch
from alignprop_fast.models.lean.adapter_copies import AdapterCopies, key_of
from alignprop_fast.models.lean.attention import project_text
from alignprop_fast.models.lean.banded_decoder import BANDED, banded_stages
from alignprop_fast.models.lean.surgery import put_ops_in
from alignprop_fast.models.lean.text_projections import TextProjections
from alignprop_fast.models.lora.learning import adapter_settings, check_learning
from alignprop_fast.models.picture_size import picture_size
from alignprop_fast.models.schedules import check_scheduler, schedule
from alignprop_fast.prompts.limits import TextReader

logger = logging.getLogger(__name__)

Generator = torch.Generator | list[torch.Generator] | None


class PipelineAdapter(ABC):
    """A diffusers pipeline with the methods that the sampler needs. The pipeline can still be used as before.

    Converts convolutions to channels_last and puts in the ops for frozen weights (`surgery.take_ops_out` removes them).
    Names, values and adapters do not change. Freezes VAE and text encoders, unless something in them is frozen already:
    then the user has chosen what learns, such as tokens or adapters of a text encoder.

    Raises:
        ValueError: the chain cannot reproduce a scheduler or model option; the message says how to change it.
    """

    schedulers: ClassVar[Sequence[str]]
    text_parts: ClassVar[Sequence[str]]
    """Names of the pipeline's parts that encode prompts."""
    has_true_cfg = False
    """Whether classifier-free guidance is that of `true_cfg_scale`, with negative prompts alone (FLUX, Qwen-Image)."""
    keeps_norm: ClassVar[str] = ""
    """The parts in which the guided prediction keeps the norm of that with the prompt (`normed_guidance`), if any."""
    limits_guidance = False
    """Whether the pipeline can limit the norm and the steps of guidance (`cfg_normalization`, `cfg_truncation`)."""
    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds", "pooled_prompt_embeds")
    """Names of a prompt's embeddings in the pipeline's own call; `negative_` in front for a negative prompt."""
    text_mask: ClassVar[str | None] = None
    """Name of the mask that may come with a prompt's embeddings: 1 for text, 0 for padding at the end."""
    unguided_scale: ClassVar[float] = 1.0
    """Up to this guidance scale the prediction is that with the prompt alone."""
    channels_per_latent: ClassVar[int] = 1
    """Channels of the denoiser's input per latent channel."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self._copies: AdapterCopies | None = None
        seen, drawn = self.denoiser.config.in_channels, self.channels_per_latent * self.latent_channels
        if seen != drawn:
            raise ValueError(
                f"the denoiser takes {seen} channels and not {drawn}: it needs a picture in addition to the prompt, as "
                "models for inpainting and editing do; use the text-to-image model that it was made from"
            )
        self.scheduler_name = check_scheduler(pipe.scheduler, self.schedulers)
        chosen = self._is_chosen()
        for module in (pipe.vae, *text_encoders(self.pipe)):
            if not chosen:
                module.requires_grad_(False)
            elif all(parameter.requires_grad for parameter in module.parameters()):
                name = type(module).__name__
                logger.warning("all of the %s requires grad and learns: requires_grad_(False) keeps it out", name)
        for module in (self.denoiser, pipe.vae.decoder):
            convolutions: list[Any] = instances(module, (nn.Conv2d,))
            for convolution in convolutions:
                convolution.to(memory_format=torch.channels_last)
            put_ops_in(module)

    @property
    @abstractmethod
    def denoiser(self) -> Any: ...

    def check_text(self, may_be_away: bool = False) -> None:
        """Raises ValueError if prompts cannot be encoded because a part is missing or on another device.

        may_be_away: the text encoders may be on the CPU, as with `TextCache`.
        """
        for name in self.text_parts:
            part = self.pipe.components.get(name)
            if part is None:
                raise ValueError(f"the pipeline has no {name}, which encodes prompts: load the pipeline with one")
            elsewhere = isinstance(part, nn.Module) and part.device != self.device
            placed = {"_hf_hook", "_diffusers_hook"} & set(vars(part))  # offloading places it for each call
            if elsewhere and not may_be_away and not placed:
                raise ValueError(
                    f"pipe.{name} is on {part.device}, the denoiser on {self.device}: use pipe.to({str(self.device)!r})"
                )

    @property
    def decoder(self) -> nn.Module:
        return self.pipe.vae

    @property
    def size_multiple(self) -> int:
        """The sides of a picture must be multiples of this many pixels."""
        return 8

    @abstractmethod
    def encode(self, batch: PromptBatch) -> Conditioning:
        """The conditioning of a batch. Gradients reach given embeddings, and text encoders that learn."""

    @abstractmethod
    def text_readers(self) -> list[TextReader]:
        """The tokenizers that read the prompts in `encode`, with their limits."""

    def _reader(
        self, name: str, tokenizer: str, limit: int | None = None, in_chat: Callable[[str, Any], str] | None = None
    ) -> list[TextReader]:
        """The reader of that tokenizer, if the pipeline has it. limit: None: the tokenizer's own."""
        found = self.pipe.components.get(tokenizer)
        if found is None:
            return []
        converted = self.pipe.maybe_convert_prompt if isinstance(self.pipe, TextualInversionLoaderMixin) else None
        return [TextReader(name, found, limit or found.model_max_length, converted, in_chat)]

    @abstractmethod
    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        """A stand-in for `encode` of B prompts, with its shapes and dtypes, to measure without text."""

    @abstractmethod
    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Model output [K * B, C, h, w] at latents x [B, C, h, w], the same latents in every branch."""

    def text_projections(self, cond: Conditioning) -> TextProjections:
        """The projections of the text that stay the same as long as the weights do."""
        return project_text(self.denoiser, cond.embeds)

    @abstractmethod
    def step_groups(self) -> dict[str, list[nn.Module]]:
        """Modules of one denoising step that can be recomputed separately, by group."""

    @property
    def latent_channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """[C, h, w] of the chain's latents for a picture of this size in pixels."""
        rows, columns = (side // self.pipe.vae_scale_factor for side in size)
        return self.latent_channels, rows, columns

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser's input: of its first weight that its class does not keep in fp32."""
        # Not `denoiser.dtype`: see `device`.
        kept = self.denoiser._keep_in_fp32_modules or ()
        return next(
            parameter.dtype
            for name, parameter in self.denoiser.named_parameters()
            if parameter.is_floating_point() and not any(part in name for part in kept)
        )

    @property
    def heeds_guidance(self) -> bool:
        """Whether the guidance scale counts; a model may be distilled to draw without guidance, whatever the scale."""
        return True

    @property
    def noise_dtype(self) -> torch.dtype:
        """The dtype in which the pipeline draws noise."""
        return self.dtype

    @property
    def device(self) -> torch.device:
        # Not `denoiser.device`, which searches all modules for hooks at each call. `check_pipeline` allows none.
        return next(self.denoiser.parameters()).device

    def trainable(self) -> list[nn.Parameter]:
        """The denoiser's parameters that require a gradient.

        Raises:
            ValueError: as `check_learning`.
        """
        check_learning(self.denoiser)
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    def adapter_copies(self) -> AdapterCopies:
        """Copies of the denoiser's learning adapters with their present values, in the same memory at every call."""
        copies = self._copies
        if copies is None or copies.key != key_of(self.denoiser):
            self._copies = copies = AdapterCopies(self.denoiser)
        copies.refresh()
        return copies

    def _is_chosen(self) -> bool:
        """Whether a part of VAE or text encoders is frozen. Quantised weights cannot learn and do not count."""
        parts = (self.pipe.vae, *text_encoders(self.pipe))
        return any(not p.requires_grad for part in parts for p in part.parameters() if p.is_floating_point())

    def reads_text(self, batch: PromptBatch) -> bool:
        """Whether texts remain to encode that have no given embeddings."""
        given = batch.embeddings
        return "prompt_embeds" not in given or (batch.guided and "negative_prompt_embeds" not in given)

    def decoder_learns(self) -> bool:
        """Whether something in the VAE requires a gradient."""
        return any(p.requires_grad for p in self.pipe.vae.parameters())

    def text_learns(self) -> bool:
        """Whether something in the text encoders requires a gradient."""
        return any(p.requires_grad for encoder in text_encoders(self.pipe) for p in encoder.parameters())

    def check_embeddings(self, given: Embeddings, batch: int) -> None:
        """Raises:
        ValueError: embeddings have unknown names, not one row per prompt, or are incomplete.
        """
        sides = [[f"{side}{name}" for name in self.embedding_names] for side in ("", "negative_")]
        masks = {f"{side}{self.text_mask}" for side in ("", "negative_") if self.text_mask}
        unknown = sorted(set(given) - {name for names in sides for name in names} - masks)
        if unknown:
            raise ValueError(f"unknown embeddings {', '.join(unknown)}: use {', '.join(sides[0] + sides[1])}")
        for names in sides:
            missing = [name for name in names if name not in given]
            if missing and len(missing) < len(names):
                raise ValueError(f"embeddings without {missing[0]}: give {' and '.join(names)} together, or neither")
        for name, tensor in given.items():
            if len(tensor) != batch:
                raise ValueError(f"{name} has {len(tensor)} rows for {batch} prompts: give one row for each prompt")

    def settings(self) -> Hashable:
        """Settings that change the denoiser's results besides weights, to compare: adapters, and FreeU of a UNet."""
        blocks = getattr(self.denoiser, "up_blocks", ())
        return adapter_settings(self.denoiser), tuple(
            getattr(b, n, None) for b in blocks for n in ("s1", "s2", "b1", "b2")
        )

    def fingerprint(self) -> Hashable:
        """Addresses of the denoiser's weights, and settings that change its results. While equal, a recording of the
        denoiser stays valid. Quantised weights are buffers."""
        parameters = list(self.denoiser.parameters())
        copies = [] if self._copies is None else self._copies.stand_ins(parameters)
        tensors = (*parameters, *self.denoiser.buffers(), *copies)
        return tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors), self.settings()

    def modules(self, with_text: bool = True) -> Sequence[nn.Module]:
        """Modules that hold weights while the chain runs. with_text: the text encoders too."""
        return [self.denoiser, self.pipe.vae, *(text_encoders(self.pipe) if with_text else ())]

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels; for None the model's own.

        Raises:
            ValueError: a side does not divide into latents and patches, or is not known.
        """
        size = picture_size(self.pipe, height, width)
        if size[0] % self.size_multiple or size[1] % self.size_multiple:
            raise ValueError(
                f"image size {size[0]} x {size[1]} is not a multiple of {self.size_multiple} pixels: round it"
            )
        return size

    def schedule(self, num_inference_steps: int, size: tuple[int, int]) -> dict[str, Any]:
        """The arguments of `sampling.make_table` for a chain of that many steps.

        Raises:
            ValueError: there are more steps than the model was trained with, or none.
        """
        config = self.pipe.scheduler.config
        if not 1 <= num_inference_steps <= config.num_train_timesteps:
            raise ValueError(f"{num_inference_steps} inference steps: use 1 to {config.num_train_timesteps}")
        scheduler = type(self.pipe.scheduler).from_config(config)
        self._set_timesteps(scheduler, num_inference_steps, size)
        return schedule(self.scheduler_name, scheduler)

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, size: tuple[int, int]) -> None:
        scheduler.set_timesteps(num_inference_steps)

    def initial_latents(
        self, batch: int, size: tuple[int, int], generator: Generator, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Unit noise [B, C, h, w] in fp32 (or wider): the given one, or drawn as in the pipeline.

        Raises:
            ValueError: the number of generators is not the batch size.
        """
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for a batch of {batch}: give one, or one each")
        shape = (batch, *self.latent_shape(size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=self.noise_dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: use {shape}")
        return latents.to(self.device, torch.promote_types(latents.dtype, torch.float32))

    def noise(self, like: torch.Tensor, generator: Generator) -> torch.Tensor:
        """Unit noise in the shape of `like`, drawn as in the scheduler."""
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=self.noise_dtype)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32 (or wider), from latents [B, C, h, w]."""
        vae = self.pipe.vae
        image = vae.decode(self._unscaled(x).to(vae.dtype), return_dict=False)[0]
        return (image.to(x.dtype) / 2 + 0.5).clamp(0, 1)

    def decode_by_bands(self, x: torch.Tensor) -> torch.Tensor:
        """As `decode` with less memory and more time: the decoder's convolutions run by bands of rows.

        A small decoder of another kind (TAESD) does not need it and runs whole.
        """
        decoder = self.pipe.vae.decoder
        with banded_stages(decoder) if isinstance(decoder, tuple(BANDED)) else nullcontext():
            return self.decode(x)

    def _unscaled(self, x: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        return x / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def decoder_groups(self) -> dict[str, list[nn.Module]]:
        """Modules of the decoder that can be recomputed separately, by segment name."""
        return {"decoder": instances(self.pipe.vae.decoder, (ResnetBlock2D, Upsample2D, Attention))}


def text_encoders(pipe: Any) -> list[nn.Module]:
    """Every text encoder of a pipeline: one for Stable Diffusion, two for SDXL and FLUX, up to three for SD3."""
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]


def instances(root: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    """Modules of these kinds below root, in their order there."""
    return [module for module in root.modules() if isinstance(module, kinds)]
