"""The pipeline class of trl's AlignProp scripts, for every supported model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from alignprop_fast.models.casting import cast_weights
from alignprop_fast.models.lean.quantization import is_quantized, quantize_linears
from alignprop_fast.models.load.pipeline import load_outline, load_pipeline
from alignprop_fast.models.lora.adapters import (
    DEFAULT,
    add_lora,
    describe,
    has_lora,
    parts_with_adapters,
    train_adapter,
    trainable_in_fp32,
)
from alignprop_fast.models.lora.factors import Lora
from alignprop_fast.models.lora.file import WEIGHTS_NAME
from alignprop_fast.models.lora.load_save import load_lora, load_new, save_lora, set_factors
from alignprop_fast.models.lora.targets import denoiser, denoiser_name
from alignprop_fast.models.pipeline_adapter import text_encoders
from alignprop_fast.models.switches import check_switches

logger = logging.getLogger(__name__)


class DefaultDDPOStableDiffusionPipeline:
    """A diffusers pipeline whose trainable parameters a trainer can get, save and load.

    Args:
        pretrained_model_name: a folder in the diffusers format, a Hub id, "demo" or "demo-twin". If the folder also
            holds LoRA weights, they are loaded and training continues from them.
        pretrained_model_revision: of a Hub model.
        use_lora: train adapters; otherwise the whole denoiser. Always true if the folder holds LoRA weights.
        scheduler, model_config, allow_pickle: as in `load_pipeline`.
        dtype: of the frozen weights when loaded. A whole denoiser to train, and adapters from the folder, are always
            loaded in fp32.
        adapter: name of the adapter to train and save; required if several require grad. A new adapter, and one from
            the folder, get this name. Other adapters are not changed, and active ones stay active. The adapter's part
            in text encoders stays frozen and is saved with it.
        outline: build the model from its configuration files, on the meta device, as `load_outline` does: for a plan.

    The diffusers pipeline itself is the attribute `sd_pipeline`.

    Raises:
        FileNotFoundError, ValueError, OSError: as `load_pipeline`.
    """

    def __init__(
        self,
        pretrained_model_name: str | Path,
        *,
        pretrained_model_revision: str = "main",
        use_lora: bool = True,
        scheduler: str = "auto",
        model_config: str | Path | None = None,
        allow_pickle: bool = False,
        dtype: torch.dtype = torch.float32,
        adapter: str | None = None,
        outline: bool = False,
    ):
        self.pretrained_model = str(pretrained_model_name)
        self.pretrained_revision = pretrained_model_revision
        self.use_lora, self.adapter = use_lora, adapter
        folder = Path(pretrained_model_name).expanduser()
        in_fp32 = not use_lora or (folder / WEIGHTS_NAME).is_file()
        load = load_outline if outline else partial(load_pipeline, allow_pickle=allow_pickle)
        self.sd_pipeline = load(
            pretrained_model_name,
            torch.float32 if in_fp32 else dtype,
            revision=pretrained_model_revision,
            scheduler=scheduler,
            model_config=model_config,
        )
        self.unet.requires_grad_(not use_lora)
        self._loaded: Lora = {}
        if (folder / WEIGHTS_NAME).is_file():
            self.use_lora, self.adapter = True, adapter or DEFAULT
            self._loaded = load_new(self.sd_pipeline, folder / WEIGHTS_NAME, self.adapter)
        own = self.sd_pipeline.scheduler
        if type(own).__name__ == "DDIMScheduler":
            # As in trl, whose chain ends at the first training timestep and not at alpha = 1.
            self.sd_pipeline.scheduler = type(own).from_config(own.config, set_alpha_to_one=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample with diffusers' own pipeline (its arguments, its output), without gradient."""
        for encoder in self.text_encoders:  # training may have left them on the CPU
            encoder.to(self.unet.device)
        return self.sd_pipeline(*args, **kwargs)

    @property
    def unet(self) -> Any:
        """The denoiser: SD's UNet, or the transformer of SD3 and FLUX."""
        return denoiser(self.sd_pipeline)

    @property
    def vae(self) -> nn.Module:
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        return self.sd_pipeline.scheduler

    @property
    def text_encoder(self) -> nn.Module:
        return self.sd_pipeline.text_encoder

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The text encoders of `sd_pipeline`, in its order."""
        return text_encoders(self.sd_pipeline)

    @property
    def autocast(self) -> Callable[[], Any] | None:
        """The context for training; None asks the trainer for its mixed-precision autocast (full fine-tuning)."""
        return contextlib.nullcontext if self.use_lora else None

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def check_switches(self) -> None:
        """Raises ValueError as `switches.check_switches` if the user switched on something unsupported."""
        check_switches(self.sd_pipeline)

    def quantize_base(self, kind: str, device: torch.device, dtype: torch.dtype) -> None:
        """Store the denoiser's large linear layers as `kind`, on the device; see `quantization.quantize_linears`.

        Raises:
            ValueError: the whole denoiser would be trained, or as `quantize_linears`.
        """
        if not self.use_lora:
            raise ValueError(
                "a quantised base model cannot be trained: use adapters (use_lora), or leave base_dtype out"
            )
        cast_weights(self.unet, dtype)
        quantize_linears(self.unet, kind, device, dtype)

    def get_trainable_layers(self, rank: int = 4, alpha: float = 4, targets: str = "attention") -> Any:
        """The denoiser with its trainable parameters in fp32.

        They are one adapter (an existing one, or a new one of that rank) or all parameters.

        Raises:
            ValueError: as `add_lora` and `train_adapter`, or a whole denoiser would be trained that has adapters.
        """
        pipe = self.sd_pipeline
        if not self.use_lora:
            if parts_with_adapters(pipe):
                raise ValueError(
                    "the whole denoiser would be trained, but the pipeline has adapters: train those with "
                    "use_lora=True, or call its fuse_lora() and unload_lora_weights() first"
                )
            trainable_in_fp32(self.unet)
            return self.unet
        goes_on, others = has_lora(pipe), bool(parts_with_adapters(pipe))
        if not goes_on:
            add_lora(pipe, rank, alpha, targets, self.adapter or DEFAULT)
        self.adapter = train_adapter(pipe, self.adapter)
        if self._loaded:  # the model's precision may have rounded them since
            set_factors(pipe, self.adapter, self._loaded)
        self._loaded = {}
        # A warning if there were adapters before, because the wrong one could be trained.
        level = logging.WARNING if others else logging.INFO
        begin = "training continues from existing adapters: " if goes_on else ""
        logger.log(level, "%s%s", begin, describe(pipe, self.adapter))
        return self.unet

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Write the pipeline, and the trained adapter beside it as `pytorch_lora_weights.safetensors`.

        The pipeline is written without adapters. `from_pretrained(folder)` followed by `load_lora_weights(folder)`
        restores the trained model, and so does this class with that folder. Other adapters are not saved.
        """
        if is_quantized(self.unet):
            raise ValueError("the base model is quantised: save only its adapters, which fit the model as loaded")
        pipe = self.sd_pipeline
        if not self.use_lora:
            pipe.save_pretrained(output_dir)
            return
        save_lora(pipe, output_dir, adapter=self.adapter)
        plain = {name: _without_adapters(part) for name, part in parts_with_adapters(pipe).items()}
        optional = pipe._get_signature_keys(pipe)[1]
        settings = {name: value for name, value in pipe.config.items() if name in optional}
        type(pipe)(**{**settings, **pipe.components, **plain}).save_pretrained(output_dir)

    def save_checkpoint(self, models: list[nn.Module], weights: list[Any], output_dir: str | Path) -> None:
        """Write the trained weights into a checkpoint folder: the adapter, or the denoiser in a folder of its name."""
        self._check_models(models)
        if self.use_lora:
            save_lora(self.sd_pipeline, output_dir, adapter=self.adapter)
        else:
            self.unet.save_pretrained(Path(output_dir) / self._denoiser_name)

    def load_checkpoint(self, models: list[nn.Module], input_dir: str | Path) -> None:
        """Read back what `save_checkpoint` wrote, into the existing parameters.

        Raises:
            FileNotFoundError, ValueError: as `load_lora`.
        """
        self._check_models(models)
        if self.use_lora:
            load_lora(self.sd_pipeline, input_dir, self.adapter)
            return
        saved = type(self.unet).from_pretrained(Path(input_dir) / self._denoiser_name, local_files_only=True)
        try:
            self.unet.load_state_dict(saved.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the weights in {input_dir} do not fit this model: load theirs") from error

    @property
    def _denoiser_name(self) -> str:
        return denoiser_name(self.sd_pipeline)

    def _check_models(self, models: list[nn.Module]) -> None:
        if len(models) != 1 or models[0] is not self.unet:
            raise ValueError("a checkpoint holds one model, this pipeline's denoiser: pass [pipeline.unet]")


def _without_adapters(model: Any) -> Any:
    """A network that shares the frozen weights of one with PEFT adapters and has no adapters itself."""
    with torch.device("meta"):
        # networks of diffusers first, then text encoders of transformers
        plain = type(model).from_config(model.config) if isinstance(model, ModelMixin) else type(model)(model.config)
    held = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    plain.load_state_dict({name: held[name] for name in plain.state_dict()}, assign=True)
    return plain
