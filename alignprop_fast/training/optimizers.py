"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch

from alignprop_fast.planner.optimizer_state import OPTIMIZERS


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-4,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """The optimizer of that name over the parameters; bytes of state per fp32 parameter as `optimizer_bytes` has them.

    adamw: AdamW (Loshchilov and Hutter 2019), two fp32 moments: 8.
    adamw8bit: AdamW with block-wise 8-bit moments (Dettmers et al. 2022): 2.03.
    pagedadamw8bit: the same with moments in memory that the driver moves to the host when the GPU is full.
    lion8bit: sign of a momentum (Chen et al. 2023), 8 bit: 1.02. Wants a learning rate 3 to 10 times smaller than Adam.
    ademamix8bit: AdamW with a second, slow average of gradients (Pagliardini et al. 2024), beta3 = 0.9999: 3.05.
    adafactor: factored second moment and no first one (Shazeer and Stern 2018), with the learning rate as given
        (no relative step, no scaling by the parameter's size); `betas` and `epsilon` are not used.
        4 (1/R + 1/C) for a matrix of R rows and C columns.
    prodigy: Adam that finds its own step size (Mishchenko and Defazio 2023): 16. Wants learning rate 1.

    The 8-bit ones are bitsandbytes' and keep tensors under 4096 elements in 32 bit: give them `FlatParameters`.

    Raises:
        ValueError: unknown name, a library that is not installed, or paged state without an NVIDIA GPU.
    """
    parameters = list(parameters)
    common: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, betas=betas, eps=epsilon, **common)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, scale_parameter=False, relative_step=False, **common)
    if name == "prodigy":
        prodigyopt = _load("prodigyopt", name)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
            return prodigyopt.Prodigy(parameters, betas=betas, eps=epsilon, **common)
    if name == "lion8bit":
        return _load("bitsandbytes", name).optim.Lion8bit(parameters, betas=betas, **common)
    if name == "ademamix8bit":
        optimizers = _load("bitsandbytes", name).optim
        return optimizers.AdEMAMix8bit(parameters, betas=(*betas, 0.9999), eps=epsilon, **common)
    if name == "adamw8bit":
        return _load("bitsandbytes", name).optim.AdamW8bit(parameters, betas=betas, eps=epsilon, **common)
    if name == "pagedadamw8bit":
        if any(parameter.device.type != "cuda" for parameter in parameters):
            raise ValueError("pagedadamw8bit needs an NVIDIA GPU, whose memory it pages: use adamw8bit")
        return _load("bitsandbytes", name).optim.PagedAdamW8bit(parameters, betas=betas, eps=epsilon, **common)
    raise ValueError(f"unknown optimizer {name!r}: use {', '.join(OPTIMIZERS)}")


def learning_rate_factor(name: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """The schedule of that name, by diffusers: optimizer steps done -> factor on the learning rate of the next one.

    constant, linear (down to 0) or cosine (half a period, down to 0) over `steps` steps, of which the first
    `warmup_steps` rise from 0. After `steps` steps the factor stays.
    """
    from diffusers.optimization import get_scheduler

    if name == "constant" and warmup_steps:  # diffusers' "constant" leaves the warm-up out without a word
        name = "constant_with_warmup"
    # A factor depends on the number of steps alone, so it is asked for with a stand-in: no state to keep.
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(name, stand_in, num_warmup_steps=warmup_steps, num_training_steps=steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return lambda done: factor(min(done, steps))  # diffusers' cosine would rise again


def _load(package: str, name: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ValueError(f'{name} needs {package}: pip install {package}, or use optimizer="adamw"') from error


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer holds now, each counted once."""
    tensors = {id(t): t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
