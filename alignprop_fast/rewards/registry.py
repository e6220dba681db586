"""Rewards by name: reads a reward specification such as `clip:1.0,compressibility:0.3`.

A specification is a list of parts, separated by commas. A part is `NAME[:WEIGHT]` for a reward of this package, with an
argument for some (`count:CLASS=N[:WEIGHT]`), or `module:function[:WEIGHT]` for a function of the user. The last piece
is the weight if it is a number (default 1).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from alignprop_fast.rewards.mixture import Part, WeightedSum
from alignprop_fast.rewards.reward import Reward, RewardFunction
from alignprop_fast.rewards.user_function import user_function
from alignprop_fast.rewards.weights import RewardLoading


def _clip(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.clip import ClipScore

    if model is None:
        from alignprop_fast.demo import clip_path

        return ClipScore(clip_path(), loading)
    return ClipScore(model, loading)


def _pickscore(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.pickscore import PickScore

    return PickScore(_needed("pickscore", model), loading)


def _hpsv2(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.hpsv2 import HpsV2

    return HpsV2(_needed("hpsv2", model), loading)


def _imagereward(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.imagereward import ImageReward

    return ImageReward(_needed("imagereward", model), loading)


def _aesthetic(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.aesthetic import Aesthetic

    return Aesthetic(_needed("aesthetic", model), loading)


def _count(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.count import Count

    return Count(argument, model, loading)


def _remove(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.count import Remove

    return Remove(argument, model, loading)


def _colorfulness(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.colorfulness import Colorfulness

    return Colorfulness()


def _compressibility(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.compressibility import Compressibility

    return Compressibility()


def _incompressibility(argument: str, model: str | None, loading: RewardLoading) -> nn.Module:
    from alignprop_fast.rewards.compressibility import Incompressibility

    return Incompressibility()


def _needed(name: str, model: str | None) -> str:
    if model is None:
        raise ValueError(f"reward {name!r} needs its published weights: give --reward-model {name}=PATH")
    return model


@dataclass(frozen=True)
class _Entry:
    build: Callable[[str, str | None, RewardLoading], nn.Module]  # argument, model
    argument: str | None = None  # the form of the argument, e.g. "CLASS=N"; None: no argument
    takes_model: bool = False


_REWARDS = {
    "aesthetic": _Entry(_aesthetic, takes_model=True),
    "clip": _Entry(_clip, takes_model=True),
    "colorfulness": _Entry(_colorfulness),
    "compressibility": _Entry(_compressibility),
    "count": _Entry(_count, argument="CLASS=N", takes_model=True),
    "hpsv2": _Entry(_hpsv2, takes_model=True),
    "imagereward": _Entry(_imagereward, takes_model=True),
    "incompressibility": _Entry(_incompressibility),
    "pickscore": _Entry(_pickscore, takes_model=True),
    "remove": _Entry(_remove, argument="CLASS", takes_model=True),
}


def reward_names() -> list[str]:
    """Names that `get_reward` knows, sorted."""
    return sorted(_REWARDS)


def get_reward(
    spec: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    model: str | Path | Sequence[str | Path] | None = None,
    allow_pickle: bool = False,
) -> WeightedSum:
    """The reward that `spec` describes, with its weights on `device`.

    dtype: of the weights of model-based rewards; scores are always fp32.
    model: the weights (a path or a Hub id), for rewards that have some; if several do, one "NAME=PATH" for each.
    allow_pickle: also read .pt, .pth and .bin files, by torch's restricted unpickler.
    Returns a callable (images [B, 3, H, W] in [0, 1], prompts, metadata) -> (scores [B], {part: scores [B], ...}).
    Raises ValueError, FileNotFoundError or OSError, one line each, if `spec` or the weights are wrong.
    """
    given = [model] if isinstance(model, str | Path) else list(model or ())
    parsed, models = parsed_spec(spec, [str(value) for value in given])
    loading = RewardLoading(allow_pickle, dtype)
    # Every reward of this package scores each image separately; other rewards may not.
    return WeightedSum(
        [Part(name, weight, _build(name, models, loading, device), _head(name) in _REWARDS) for name, weight in parsed]
    )


def parsed_spec(spec: str, models: Sequence[str]) -> tuple[list[tuple[str, float]], dict[str, str]]:
    """Name and weight of each part of `spec`, and the model of each reward.

    Raises ValueError if a part is empty or repeated, or if it is not clear which part a model belongs to.
    """
    pieces = [part.strip() for part in spec.split(",")]
    if not all(pieces):
        raise ValueError(f"empty part in the reward {spec!r}; write for example 'clip:1.0,compressibility:0.3'")
    parsed = [_parse(part) for part in pieces]
    names = [name for name, _ in parsed]
    if len(set(names)) < len(names):
        raise ValueError(f"the reward {spec!r} names {_first_repeated(names)!r} twice; give it once, with one weight")
    return parsed, _assigned(spec, names, models)


def split_model(value: str) -> tuple[str | None, str]:
    """`NAME=PATH` -> (NAME, PATH) if NAME is a reward that takes a model; anything else is a path: (None, value)."""
    name, equals, path = value.partition("=")
    return (name, path) if equals and name in _REWARDS and _REWARDS[name].takes_model else (None, value)


def _assigned(spec: str, names: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    """The model of each reward of `spec`."""
    takers = list(dict.fromkeys(head for head in map(_head, names) if head in _REWARDS and _REWARDS[head].takes_model))
    models: dict[str, str] = {}
    for name, path in map(split_model, values):
        if not takers or (name is not None and name not in takers):
            raise ValueError(f"a reward model was given, but nothing in {spec!r} uses {name or 'one'}; leave it out")
        if name is None and len(takers) > 1:
            raise ValueError(
                f"which of {', '.join(takers)} is {path} for? Give it as NAME=PATH, for example {takers[0]}={path}"
            )
        name = name or takers[0]
        if name in models:
            raise ValueError(f"two models were given for the reward {name!r}; leave one out")
        models[name] = path
    return models


def _parse(part: str) -> tuple[str, float]:
    """`a:b:0.5` -> (`a:b`, 0.5)"""
    name, colon, last = part.rpartition(":")
    try:
        weight = float(last) if colon else None
    except ValueError:
        weight = None
    if weight is None:
        return part, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"the weight of reward {part!r} is not a finite number")
    return name, weight


def _head(name: str) -> str:
    return name.partition(":")[0]


def _first_repeated(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _build(
    name: str, models: Mapping[str, str], loading: RewardLoading, device: str | torch.device
) -> Reward | RewardFunction:
    head, colon, rest = name.partition(":")
    if head not in _REWARDS:
        if colon:
            return user_function(name, f"reward {name!r}", _known())
        close = difflib.get_close_matches(head, _REWARDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"there is no reward {head!r}{hint} {_known()}")
    entry = _REWARDS[head]
    if bool(rest) != (entry.argument is not None) or (colon and not rest):
        form = f"{head}:{entry.argument}" if entry.argument else head
        raise ValueError(f"reward {name!r} must be written {form!r} (and :WEIGHT)")
    return entry.build(rest, models.get(head), loading).to(device)


def _known() -> str:
    return f"Rewards by name: {', '.join(reward_names())}; your own is written module:function"
