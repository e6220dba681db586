"""Weighted sum of rewards, with a check of the scores that each returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.rewards.reward import Reward, RewardFunction, as_reward, check_gradient


@dataclass(frozen=True)
class Part:
    """One reward of a mixture.

    name: the key of its scores in `info`.
    by_image: whether a function or module scores each image separately.
    """

    name: str
    weight: float
    reward: Reward | RewardFunction
    by_image: bool = False


class WeightedSum(Reward):
    """score = sum over parts of weight * score of the part.

    info = {part name: its scores, unweighted and detached}, and the parts' own infos. These keep their keys, but if a
    key is also a part's name or belongs to two parts, it becomes "part name/key".
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._rewards = [as_reward(part.reward, part.by_image) for part in self.parts]
        self.by_image = all(reward.by_image for reward in self._rewards)
        self.observes = any(reward.observes for reward in self._rewards)

    def weight_bytes(self) -> int:
        return sum(reward.weight_bytes() for reward in self._rewards)

    def state(self) -> Hashable:
        return tuple(reward.state() for reward in self._rewards)

    def observe(self, info: Mapping[str, Any]) -> None:
        """Pass `info` on to the parts that observe. Each finds its own entries under the keys that it gave them."""
        for part, reward in zip(self.parts, self._rewards, strict=True):
            if reward.observes:
                prefix = f"{part.name}/"
                own = {key.removeprefix(prefix): value for key, value in info.items() if key.startswith(prefix)}
                reward.observe({**info, **own})

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """images_BCHW: [B, 3, H, W] in [0, 1]. Returns scores, fp32 or wider, [B], and info.

        Raises ValueError if images or prompts have the wrong shape or number, or a part does not return B scores with a
        gradient.
        """
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or not images_BCHW.is_floating_point():
            raise ValueError(f"rewards take float images [B, 3, H, W], not {_describe(images_BCHW)}")
        if len(prompts) != len(images_BCHW):
            raise ValueError(f"rewards take one prompt per image, not {len(prompts)} for {len(images_BCHW)}")
        total_B, own = None, {}
        info: dict[str, Any] = {}
        for part, reward in zip(self.parts, self._rewards, strict=True):
            result = reward(images_BCHW, prompts, metadata)
            scores_B = checked_scores(part.name, result, images_BCHW)
            info[part.name] = scores_B.detach()
            own[part.name] = _own_info(result)
            weighted_B = self._weighted(part, scores_B)
            total_B = weighted_B if total_B is None else total_B + weighted_B
        assert total_B is not None
        return total_B, info | _merged(own, taken=set(info))

    def _weighted(self, part: Part, scores_B: Tensor) -> Tensor:
        return part.weight * scores_B


def checked_scores(name: str, result: Any, images_BCHW: Tensor) -> Tensor:
    """The scores, [B], from a reward's result (scores, or scores and info), on the images' device, fp32 or wider.

    Raises ValueError, naming the reward, if the shape or type is wrong, or if the scores have no gradient to the
    images.
    """
    scores_B = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    batch = len(images_BCHW)
    if not isinstance(scores_B, Tensor) or scores_B.shape != (batch,) or not scores_B.is_floating_point():
        raise ValueError(
            f"reward {name!r} must return a float tensor of shape [{batch}], one score per image, or (scores, info); "
            f"it returned {_describe(scores_B)}"
        )
    check_gradient(name, scores_B, images_BCHW)
    return scores_B.to(images_BCHW.device, torch.promote_types(scores_B.dtype, torch.float32))


def _own_info(result: Any) -> dict[str, Any]:
    """The info that a reward returned with its scores, if it is a dictionary, with tensors detached."""
    info = result[1] if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping) else {}
    return {str(key): value.detach() if isinstance(value, Tensor) else value for key, value in info.items()}


def _merged(own: Mapping[str, Mapping[str, Any]], taken: set[str]) -> dict[str, Any]:
    keys = Counter(key for info in own.values() for key in info)
    clashing = taken | {key for key, number in keys.items() if number > 1}
    return {
        f"{name}/{key}" if key in clashing else key: value for name, info in own.items() for key, value in info.items()
    }


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
