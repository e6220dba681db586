"""Rewards relative to words."""

import pytest
import torch

from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.relative import relative_to


def test_a_relative_score_is_the_difference_of_two(pictures):
    images, reward = pictures("demo", 64)[:3].requires_grad_(), get_reward("clip:2,colorfulness")
    relative = relative_to(reward, "two | a blue")
    scores, info = relative(images, ["cats"] * 3, [{}] * 3)
    clip = get_reward("clip")
    wanted = clip(images, ["two cats"] * 3, [{}] * 3)[0] - clip(images, ["a blue cats"] * 3, [{}] * 3)[0]
    assert torch.allclose(scores, 2 * wanted, atol=1e-6) and info["colorfulness"].abs().max() == 0
    assert torch.allclose(*(torch.autograd.grad(s.sum(), images)[0] for s in (scores, 2 * wanted)), atol=1e-6)
    assert relative.weight_bytes() == reward.weight_bytes() > 0 and relative.by_image == reward.by_image


def test_words_before_nothing(pictures):
    images, clip = pictures("demo", 64)[:1], get_reward("clip")
    found = relative_to(clip, "|a blue")(images, ["cat"], [{}])[0]
    assert torch.allclose(found, clip(images, ["cat"], [{}])[0] - clip(images, ["a blue cat"], [{}])[0], atol=1e-6)


@pytest.mark.parametrize("words", ["sharp", "sharp|sharp", "|"])
def test_other_forms_are_refused(words):
    with pytest.raises(ValueError, match="reward words"):
        relative_to(get_reward("colorfulness"), words)
