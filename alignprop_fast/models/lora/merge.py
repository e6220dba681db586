"""Mix LoRA files linearly in the weight delta, without loading a model.

    delta = sum_i w_i s_i B_i A_i        s_i = alpha_i / rank_i of file i, w_i its weight in the mixture

Stacking is exact: A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]. The rank is then the sum of the ranks. A
truncated SVD reduces it to a given rank with the smallest possible error in the Frobenius norm (Eckart and Young 1936).
With B = Q_b R_b and A^T = Q_a R_a, only the small matrix R_b R_a^T is decomposed and delta is never formed.

PEFT's `add_weighted_adapter` mixes adapters that a model carries. It needs the base model, decomposes the full delta,
pads every module to one rank and reports no error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignprop_fast.models.lora.factors import Factors, Lora


@dataclass(frozen=True)
class Merged:
    """A mixture and its error ||delta - kept|| / ||delta|| (Frobenius), for each module and for all together."""

    factors: Lora
    errors: dict[str, float]
    relative_error: float


def merge_loras(loras: Sequence[tuple[Lora, float]], rank: int | None = None) -> Merged:
    """sum_i weight_i delta_i, exact or with at most the given rank. A module that an adapter lacks counts as zero.

    Raises:
        ValueError: weights are not finite or all zero, the rank is below 1, or the adapters have no module in common or
            one with different shapes.
    """
    _check(loras, rank)
    used = [(lora, weight) for lora, weight in loras if weight != 0]
    factors: Lora = {}
    kept_squared: dict[str, tuple[float, float]] = {}  # squared norms of each module: lost, whole
    for module in sorted({name for lora, _ in used for name in lora}):
        stacked = _stacked([(lora[module], weight) for lora, weight in used if module in lora])
        factors[module], kept_squared[module] = (stacked, (0.0, 1.0)) if rank is None else _truncated(stacked, rank)
    errors = {module: math.sqrt(lost / whole) if whole else 0.0 for module, (lost, whole) in kept_squared.items()}
    lost, whole = (sum(pair[i] for pair in kept_squared.values()) for i in (0, 1))
    return Merged(factors, errors, math.sqrt(lost / whole) if whole else 0.0)


def _check(loras: Sequence[tuple[Lora, float]], rank: int | None) -> None:
    weights = [weight for _, weight in loras]
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"the weights {weights} are not all finite: use numbers such as 0.5")
    if not any(weights):
        raise ValueError("every weight is 0, which gives the base model: set at least one other weight")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank is {rank}: use at least 1")
    if not set.intersection(*(set(lora) for lora, _ in loras)):
        raise ValueError("the adapters have no module in common: merge adapters of the same model")
    seen: dict[str, tuple[int, ...]] = {}
    for lora, _ in loras:
        for module, factors in lora.items():
            if seen.setdefault(module, factors.places) != factors.places:
                first, other = (" x ".join(map(str, places)) for places in (seen[module], factors.places))
                raise ValueError(
                    f"{module} has {first} weights in one adapter and {other} in another: merge adapters of the same "
                    "model"
                )


def _stacked(parts: Sequence[tuple[Factors, float]]) -> Factors:
    downs = torch.cat([factors.down for factors, _ in parts])
    return Factors(downs, torch.cat([weight * factors.scaled_up() for factors, weight in parts], dim=1))


def _truncated(factors: Factors, rank: int) -> tuple[Factors, tuple[float, float]]:
    """The nearest delta of that rank, and the squared Frobenius norms of the lost part and of the whole."""
    # In float64, because the error of a sufficient rank is a difference of nearly equal numbers.
    q_up, r_up = torch.linalg.qr(factors.scaled_up().flatten(1).double())
    q_down, r_down = torch.linalg.qr(factors.down.flatten(1).double().T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    up = (q_up @ (u[:, :rank] * root)).reshape(-1, rank, *factors.up.shape[2:])
    down = ((v[:rank] * root[:, None]) @ q_down.T).reshape(rank, *factors.down.shape[1:])
    squared = s.square()
    return Factors(down.float(), up.float()), (float(squared[rank:].sum()), float(squared.sum()))
