"""The training loop that all bundled networks share: warm-up, cooldown, weight average, exact resume."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from alignprop_fast.files import whole
from alignprop_fast.making.muon import Muon, fits

Modules = dict[str, nn.Module]


@dataclass(frozen=True)
class Settings:
    """The learning rate is constant after `warmup_steps` and falls to zero (cosine) over the last `cooldown` part.

    muon: train matrices and convolutions with Muon, and the rest with AdamW; False: everything with AdamW.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup_steps: int = 100
    cooldown: float = 0.3
    average_decay: float = 0.998
    checkpoint_every: int = 100
    muon: bool = False

    def as_it_stands(self) -> "Settings":
        """Settings without further steps, which use the checkpoint as it is."""
        return replace(self, steps=0)

    def learning_rate_at(self, step: int) -> float:
        left = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * fall

    def optimizers(self, parameters: list[Tensor]) -> list[torch.optim.Optimizer]:
        turned = [parameter for parameter in parameters if self.muon and fits(parameter)]
        others = [parameter for parameter in parameters if not (self.muon and fits(parameter))]
        kinds = ((torch.optim.AdamW, others), (Muon, turned))
        return [make(some, self.learning_rate, weight_decay=self.weight_decay) for make, some in kinds if some]


def fit(
    modules: Modules,
    loss_at: Callable[[torch.Generator], Tensor],
    settings: Settings,
    checkpoint: Path,
    seed: int,
    on_checkpoint: Callable[[int, Modules], None],
) -> Modules:
    """Trains `modules` in place on `loss_at` and returns their exponential moving averages.

    All randomness of a step comes from a generator seeded with (seed, step), so a run resumed from `checkpoint`
    takes the same steps as an uninterrupted one. `on_checkpoint(step, averages)` is called after each checkpoint.
    """
    parameters: list[Tensor] = [parameter for module in modules.values() for parameter in module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizers = settings.optimizers(trained)
    averages = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()}
    averaged: list[Tensor] = [parameter for module in averages.values() for parameter in module.parameters()]
    first, seconds = _restore(checkpoint, modules, averages, optimizers, settings.steps)
    started, recent = time.monotonic() - seconds, []
    for step in range(first, settings.steps):
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = settings.learning_rate_at(step)
        loss = loss_at(generator)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(settings.average_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - decay)
        recent.append(loss.item())
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            seconds = time.monotonic() - started
            mean = sum(recent) / len(recent)
            print(f"{checkpoint.stem} step {step + 1}/{settings.steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
            recent.clear()
            _save(checkpoint, modules, averages, optimizers, step + 1, seconds)
            on_checkpoint(step + 1, averages)
    return averages


def _save(path: Path, modules: Modules, averages: Modules, optimizers, step: int, seconds: float) -> None:
    state = {
        "step": step,
        "seconds": seconds,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "averages": {name: module.state_dict() for name, module in averages.items()},
    }
    with whole(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path, modules: Modules, averages: Modules, optimizers, steps: int) -> tuple[int, float]:
    if not path.exists():
        if steps == 0:
            raise FileNotFoundError(f"{path} is missing; run the stage {path.stem!r} first")
        return 0, 0.0
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
        averages[name].load_state_dict(state["averages"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]
