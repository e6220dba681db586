"""Rewards relative to words: how much better a picture fits its prompt with good words than with bad ones."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from alignprop_fast.rewards.mixture import WeightedSum
from alignprop_fast.rewards.reward import Reward, as_reward


class Relative(Reward):
    """score = reward(picture, "POSITIVE PROMPT") - reward(picture, "NEGATIVE PROMPT").

    What the reward prefers in every picture cancels out, which leaves less to exploit. A reward that ignores the prompt
    scores 0. Source: SRPO (Shen et al. 2025, arXiv 2509.06942). Its code multiplies the first score by 1 + k for a
    small k; ours does not.

    Args:
        reward: called twice for each batch.
        positive, negative: written before the prompt; "" for nothing.
    """

    def __init__(self, reward: Reward, positive: str, negative: str) -> None:
        self.reward, self.positive, self.negative = reward, positive, negative
        self.by_image = reward.by_image

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        good_B, bad_B = (
            self.reward(images_BCHW, [f"{words} {prompt}".strip() for prompt in prompts], metadata)[0]
            for words in (self.positive, self.negative)
        )
        return good_B - bad_B, {}

    def weight_bytes(self) -> int:
        return self.reward.weight_bytes()

    def state(self) -> Hashable:
        return self.reward.state()


def relative_to(reward: WeightedSum, words: str) -> WeightedSum:
    """Every part of the reward relative to words "POSITIVE|NEGATIVE".

    Raises:
        ValueError: the text has another form.
    """
    positive, bar, negative = (text.strip() for text in words.partition("|"))
    if not bar or positive == negative:
        raise ValueError(f'reward words {words!r}: give two texts, such as "a sharp photo of|a blurry photo of"')
    parts = [
        replace(part, reward=Relative(as_reward(part.reward, part.by_image), positive, negative))
        for part in reward.parts
    ]
    return WeightedSum(parts)
