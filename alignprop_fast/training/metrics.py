"""What is known about one optimizer step once it is done."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all micro-batches and processes.

    step: optimizer steps done, this one included.
    reward_mean, reward_std: over the images of the step (the mean of the micro-batches' values, as trl logs them).
    reward_parts: mean of each part that the reward reports in its info.
    loss: mean of the micro-batches' losses, the regulariser included.
    grad_norm: before clipping; 0 where there was no gradient.
    learning_rate: what the optimizer stepped with, or would have.
    gradient_steps: denoising steps that carried gradient, summed over the micro-batches; alike in all processes.
    status: "ok"; "no_gradient": the random gates left no step open; "not_finite": the update was skipped.
    images_per_second: images of all processes over seconds.
    peak_bytes: peak of the device's memory in this step, on the CPU the process's peak so far (resident set); of
        several processes the largest.
    seconds: wall time of the step, without checkpoints and hooks.
    base_mse: mean squared difference of the model's output to the base model's; None where it is not measured.
    """

    step: int
    reward_mean: float
    reward_std: float
    reward_parts: dict[str, float]
    loss: float
    grad_norm: float
    learning_rate: float
    gradient_steps: int
    status: str
    images_per_second: float
    peak_bytes: int
    seconds: float
    base_mse: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, texts and one nested dictionary."""
        return asdict(self)

    def to_log(self) -> dict[str, float]:
        """The numbers alone, flat, for a tracker."""
        fields = self.to_dict()
        parts = {f"reward/{name}": value for name, value in fields.pop("reward_parts").items()}
        numbers = {
            name: value for name, value in fields.items() if name not in ("step", "status") and value is not None
        }
        return {**numbers, **parts}


@dataclass(frozen=True)
class BatchShare:
    """One process's part of one micro-batch, on the host.

    rewards: [B], fp32. reward_parts: as in `StepMetrics`. loss: a mean over the B images. scores: each [B], of the
        parts of a reward that wants to observe them.
    """

    rewards: torch.Tensor
    reward_parts: dict[str, float]
    loss: float
    gradient_steps: int
    base_mse: float | None
    scores: dict[str, torch.Tensor]


@dataclass(frozen=True)
class BatchMetrics:
    """One micro-batch, over all processes: the fields of `StepMetrics` that are averaged over them."""

    reward_mean: float
    reward_std: float
    reward_parts: dict[str, float]
    loss: float
    gradient_steps: int
    base_mse: float | None = None


def joined(shares: Sequence[BatchShare]) -> BatchMetrics:
    """One micro-batch of its shares, one of each process; of the reward's parts those that all report."""
    rewards = torch.cat([share.rewards for share in shares])
    measured = [share.base_mse for share in shares if share.base_mse is not None]
    common = [name for name in shares[0].reward_parts if all(name in share.reward_parts for share in shares)]
    return BatchMetrics(
        reward_mean=rewards.mean().item(),
        reward_std=rewards.std(correction=0).item(),
        reward_parts={name: fmean(share.reward_parts[name] for share in shares) for name in common},
        loss=fmean(share.loss for share in shares),
        gradient_steps=max(share.gradient_steps for share in shares),
        base_mse=fmean(measured) if measured else None,
    )


def averages(batches: Sequence[BatchMetrics]) -> dict[str, Any]:
    """Reward, parts, loss, distance to the base model (means), gradient steps (sum) of the micro-batches of a step."""

    def mean(values: Iterable[float]) -> float:
        return fmean([*values])

    measured = [batch.base_mse for batch in batches if batch.base_mse is not None]
    names = [name for name in batches[0].reward_parts if all(name in batch.reward_parts for batch in batches)]
    return {
        "reward_mean": mean(batch.reward_mean for batch in batches),
        "reward_std": mean(batch.reward_std for batch in batches),
        "reward_parts": {name: mean(batch.reward_parts[name] for batch in batches) for name in names},
        "loss": mean(batch.loss for batch in batches),
        "gradient_steps": sum(batch.gradient_steps for batch in batches),
        "base_mse": mean(measured) if measured else None,
    }


def reward_parts(info: Any) -> dict[str, float]:
    """Mean of every numeric entry of a reward's info; other entries are left out."""
    parts = {}
    for name, value in info.items() if isinstance(info, Mapping) else ():
        try:
            parts[str(name)] = float(torch.as_tensor(value, dtype=torch.float64).detach().mean())
        except (TypeError, ValueError, RuntimeError):
            continue
    return parts


def image_scores(info: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The parts of a reward's info that have a score for each image, [B], on the host."""
    return {name: part.detach().cpu() for name, part in info.items() if isinstance(part, torch.Tensor) and part.ndim}


def joined_scores(shares: Sequence[BatchShare]) -> dict[str, torch.Tensor]:
    """The scores of one micro-batch over all processes."""
    return {name: torch.cat([share.scores[name] for share in shares]) for name in shares[0].scores}


def reset_peak_bytes(device: torch.device) -> None:
    """Begin a new peak, on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak_bytes` on a GPU; elsewhere the process's peak resident set so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
