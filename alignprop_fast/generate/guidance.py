"""Guidance of a sampler's chains: its scale, its kind, and the prompts that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from alignprop_fast.sampling import limited_guidance, normed_guidance, rescaled_guidance

Scale = float | torch.Tensor


class GuidedModel(Protocol):
    """What guidance asks of a model (`PipelineAdapter`)."""

    @property
    def heeds_guidance(self) -> bool: ...
    @property
    def unguided_scale(self) -> float: ...
    @property
    def has_true_cfg(self) -> bool: ...
    @property
    def keeps_norm(self) -> str: ...
    @property
    def limits_guidance(self) -> bool: ...


@dataclass(frozen=True)
class Guidance:
    """How predictions are guided towards the prompt.

    scale: of classifier-free guidance, which needs predictions with and without the prompt, as the pipeline counts it.
    unguided: the scale that means none; up to it guidance is off.
    embedded_scale: the input of a denoiser with distilled guidance (FLUX).
    rescale: phi of Lin et al. 2023; 0 turns it off.
    needs_negative: classifier-free guidance is used only with negative prompts, as in FLUX.
    keeps_norm: the parts, such as patches, in which the guided prediction keeps the norm of that with the prompt, as in
        Qwen-Image; empty: none.
    norm_limit: the guided prediction of a picture has at most this many times the norm of that with the prompt, as in
        Z-Image; 0: no limit.
    until: guidance is off in steps at which a larger share of the noise is gone, as in Z-Image; 1: it is never off.

    A scale is a number, or a tensor of one number that requires a gradient.
    """

    scale: Scale
    unguided: float
    embedded_scale: Scale
    rescale: float
    needs_negative: bool
    keeps_norm: str = ""
    norm_limit: float = 0.0
    until: float = 1.0

    @classmethod
    def of(
        cls,
        model: GuidedModel,
        scale: Scale,
        true_cfg_scale: Scale = 1.0,
        rescale: Any = 0.0,
        norm_limit: Any = 0.0,
        until: Any = 1.0,
    ) -> Guidance:
        """From a sampler's arguments, for a model.

        Raises:
            ValueError: a tensor holds several numbers, or requires a gradient but must be a number; or the model does
                not have an option, or rescales in its own way.
        """
        for name, is_given in (("cfg_normalization", norm_limit != 0), ("cfg_truncation", until != 1)):
            if is_given and not model.limits_guidance:
                raise ValueError(f"{name} is an option of Z-Image: leave it out for other models")
        unguided = model.unguided_scale
        scale, true_cfg_scale = _one_number(scale if model.heeds_guidance else unguided), _one_number(true_cfg_scale)
        own, rescale = true_cfg_scale if model.has_true_cfg else scale, plain_number("guidance_rescale", rescale)
        if rescale and model.keeps_norm:
            raise ValueError("this model keeps the norm of its predictions under guidance: leave guidance_rescale out")
        norm_limit = plain_number("cfg_normalization", norm_limit)
        if norm_limit and rescale:
            raise ValueError("guidance_rescale and cfg_normalization both change the guided prediction: give one")
        until = plain_number("cfg_truncation", until)
        return cls(own, unguided, scale, rescale, model.has_true_cfg, model.keeps_norm, norm_limit, until)

    @property
    def cfg_scale(self) -> Scale:
        """s in u + s (c - u), for predictions c and u with and without the prompt; off at 1 or less."""
        return self.scale if self.unguided == 1 else self.scale + (1 - self.unguided)

    @property
    def is_linear(self) -> bool:
        """Whether the guided prediction is u + s (c - u) itself."""
        return self.rescale == 0 and self.norm_limit == 0 and not self.keeps_norm

    def guided(self, y: torch.Tensor, scale: Scale) -> torch.Tensor:
        """The prediction [B, C, h, w] from those without and with the prompt [2 B, C, h, w], at this `cfg_scale`."""
        if self.norm_limit:
            return limited_guidance(y, scale, self.norm_limit)
        if self.keeps_norm:
            return normed_guidance(y, scale, self.keeps_norm)
        return rescaled_guidance(y, scale, self.rescale)

    def reaches(self, timestep: float) -> bool:
        """Whether a step at this timestep, 1000 (noise) to 0, is guided. In fp32, as in Z-Image's pipeline."""
        if self.until >= 1:
            return True
        gone = (1000 - torch.tensor(timestep, dtype=torch.float32)) / 1000
        return gone.item() <= self.until

    def is_on(self, has_negative: bool) -> bool:
        """Whether the denoiser runs with and without the prompt. has_negative: there is a negative prompt."""
        return bool(self.cfg_scale > 1) and (has_negative or not self.needs_negative)


def plain_number(name: str, value: Any) -> float:
    """The value as a number. Raises ValueError for a tensor that requires a gradient, because it would get none."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a tensor that requires a gradient, which is not supported here: give a number")
    return float(value)


def _one_number(scale: Scale) -> Scale:
    """The scale as a number, or the tensor itself if it requires a gradient.

    Raises:
        ValueError: the tensor holds several numbers.
    """
    if not isinstance(scale, torch.Tensor):
        return scale
    if scale.numel() != 1:
        raise ValueError(f"the guidance scale has shape {list(scale.shape)}: give one number for all prompts")
    return scale if scale.requires_grad else scale.item()
