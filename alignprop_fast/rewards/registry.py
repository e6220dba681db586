"""Rewards by name: what a reward specification such as `clip:1.0,compressibility:0.3` means.

A specification is a list of parts, separated by commas. A part is `NAME[:ARGUMENT][:WEIGHT]` for a reward of this
package, or `module:function[:WEIGHT]` for a function of the user's; its last piece is the weight if it is a number
(default 1).
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .mixture import Part, Reward, WeightedSum


def _clip(argument: str | None, model: Path | None) -> Reward:
    from .clip import ClipScore

    if model is None:
        from alignprop_fast.demo import clip_path

        model = clip_path()
    return ClipScore(model)


def _colorfulness(argument: str | None, model: Path | None) -> Reward:
    from .colorfulness import Colorfulness

    return Colorfulness()


def _compressibility(argument: str | None, model: Path | None) -> Reward:
    from .compressibility import Compressibility

    return Compressibility()


def _incompressibility(argument: str | None, model: Path | None) -> Reward:
    from .compressibility import Incompressibility

    return Incompressibility()


@dataclass(frozen=True)
class _Entry:
    build: Callable[[str | None, Path | None], Reward]  # argument, model
    argument: str | None = None  # how the argument is written, e.g. "CLASS=N"; None: there is none
    takes_model: bool = False


_REWARDS = {
    "clip": _Entry(_clip, takes_model=True),
    "colorfulness": _Entry(_colorfulness),
    "compressibility": _Entry(_compressibility),
    "incompressibility": _Entry(_incompressibility),
}


def reward_names() -> list[str]:
    """Names that `get_reward` knows, sorted."""
    return sorted(_REWARDS)


def get_reward(spec: str, *, device: str | torch.device = "cpu", model: str | Path | None = None) -> WeightedSum:
    """The reward that `spec` describes, with its weights on `device`.

    model: folder of the weights, for rewards that can take another model than their own (`clip`).
    Returns a callable (images [B, 3, H, W] in [0, 1], prompts, metadata) -> (scores [B], {part: scores [B]}).
    Raises ValueError, FileNotFoundError or OSError, one line each, that say what is wrong with `spec` or the weights.
    """
    pieces = [part.strip() for part in spec.split(",")]
    if not all(pieces):
        raise ValueError(f"empty part in the reward {spec!r}; write for example 'clip:1.0,compressibility:0.3'")
    parsed = [_parse(part) for part in pieces]
    names = [name for name, _ in parsed]
    if len(set(names)) < len(names):
        raise ValueError(f"the reward {spec!r} names {_first_repeated(names)!r} twice; give it once, with one weight")
    if model is not None and not any(name in _REWARDS and _REWARDS[name].takes_model for name in map(_head, names)):
        raise ValueError(f"a reward model was given, but nothing in {spec!r} uses one; leave it out")
    folder = None if model is None else Path(model)
    return WeightedSum([Part(name, weight, _build(name, folder, device)) for name, weight in parsed])


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


def _build(name: str, model: Path | None, device: str | torch.device) -> Callable[..., Any]:
    head, colon, rest = name.partition(":")
    if head not in _REWARDS:
        if colon:
            return _user_function(name, head, rest)
        close = difflib.get_close_matches(head, _REWARDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"there is no reward {head!r}{hint} {_known()}")
    entry = _REWARDS[head]
    if bool(colon) != (entry.argument is not None):
        form = f"{head}:{entry.argument}" if entry.argument else head
        raise ValueError(f"reward {name!r} must be written {form!r} (and :WEIGHT)")
    reward = entry.build(rest or None, model)
    return reward.to(device) if isinstance(reward, nn.Module) else reward


def _known() -> str:
    return f"Rewards by name: {', '.join(reward_names())}; one of your own is written module:function"


def _user_function(name: str, module_name: str, function_name: str) -> Callable[..., Any]:
    # As for `python -m`, modules in the working directory count; only while importing, since other code (transformers
    # among it) looks for optional packages by name and must not find folders that happen to lie there.
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"reward {name!r}: no module {error.name!r} in {folder} nor installed. {_known()}"
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"reward {name!r}: importing {module_name!r} failed with {reason}") from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "is not a function" if hasattr(module, function_name) else "does not exist"
        raise ValueError(f"reward {name!r}: {function_name!r} {found} in {module.__file__ or module_name}")
    return function
