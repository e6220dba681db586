"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")


def state_bytes(name: str, parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of the optimizer's state for parameters in fp32.

    Raises:
        ValueError: unknown name.
    """
    return sum(_state_bytes(name, parameter.shape) for parameter in parameters)


def _state_bytes(name: str, shape: torch.Size) -> int:
    numbers = shape.numel()
    if name == "adamw":
        return 8 * numbers
    if name == "adamw8bit":
        # One byte a moment and a scale for each 256 of them; small tensors stay in fp32 (bitsandbytes).
        return 2 * (numbers + 4 * -(-numbers // 256)) if numbers >= 4096 else 8 * numbers
    if name == "adafactor":
        return 4 * (numbers if len(shape) < 2 else numbers // shape[-1] + numbers // shape[-2])
    raise ValueError(f"unknown optimizer {name!r}: use {', '.join(OPTIMIZERS)}")


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-4,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """The optimizer of that name over the parameters.

    adamw: AdamW (Loshchilov and Hutter 2019), two fp32 moments, 8 bytes per fp32 parameter.
    adamw8bit: AdamW with block-wise 8-bit moments (Dettmers et al. 2022), 2 bytes per parameter; needs bitsandbytes.
    adafactor: factored second moment and no first one (Shazeer and Stern 2018), with the learning rate as given
        (no relative step, no scaling by the parameter's size); `betas` and `epsilon` are not used.

    Raises:
        ValueError: unknown name, or a library that is not installed.
    """
    parameters = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon)
    if name == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise ValueError(
                'adamw8bit needs bitsandbytes: pip install bitsandbytes, or use optimizer="adamw"'
            ) from error
        return bitsandbytes.optim.AdamW8bit(
            parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon
        )
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, lr=learning_rate, weight_decay=weight_decay, scale_parameter=False, relative_step=False
        )
    raise ValueError(f"unknown optimizer {name!r}: use {', '.join(OPTIMIZERS)}")
