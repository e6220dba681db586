"""Rewards without weights: as many parameters as published, and forward and backward passes on shapes only."""

import pytest
import torch

from alignprop_fast.demo import clip_path
from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.architectures import architecture_reward
from alignprop_fast.rewards.clip import ClipScore

# Elements in the published weights, without buffers: all of CLIP ViT-H/14, all of ViT-L/14, its picture tower with the
# five-layer head, ImageReward without unused weights.
VIT_H, VIT_L = 986_109_441, 427_616_513
VIT_L_VISION, FIVE_LAYERS = 303_179_776 + 1024 * 768, 930_000
PUBLISHED = {"hpsv2": VIT_H, "pickscore": VIT_H, "clip": VIT_L}
NAMES = (*PUBLISHED, "aesthetic", "imagereward", "colorfulness", "compressibility", "incompressibility")


def elements(reward):
    return sum(p.numel() for part in reward.parts for p in part.reward.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients_have_the_right_shapes(name):
    reward = architecture_reward(name, torch.bfloat16)
    images = torch.zeros(2, 3, 256, 320, device="meta", requires_grad=True)
    scores, info = reward(images, ["a cat", "a dog"], [{}, {}])
    assert scores.shape == (2,) and scores.dtype == torch.float32 and scores.device.type == "meta"
    assert torch.autograd.grad(scores.sum(), images)[0].shape == images.shape
    assert name in info and reward.by_image


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_networks_have_the_published_size(name):
    reward = architecture_reward(name, torch.bfloat16)
    assert elements(reward) == PUBLISHED[name]
    assert reward.weight_bytes() == pytest.approx(2 * PUBLISHED[name], rel=1e-3)


def test_a_clip_folder_gives_its_own_network():
    own, real = architecture_reward("clip", torch.float32, [clip_path()]), ClipScore(clip_path())
    assert own.weight_bytes() == sum(t.numel() * t.element_size() for t in (*real.parameters(), *real.buffers()))
    assert own.parts[0].reward.preprocess == real.preprocess


def test_mixtures_and_rewards_with_weights_in_the_package():
    reward = architecture_reward("clip:0.5,count:apple=2", torch.float32, [f"clip={clip_path()}"])
    assert [(part.name, part.weight) for part in reward.parts] == [("clip", 0.5), ("count:apple=2", 1.0)]
    images = torch.zeros(1, 3, 64, 64, device="meta", requires_grad=True)
    assert torch.autograd.grad(reward(images, ["x"], [{}])[0].sum(), images)[0].shape == images.shape


@pytest.mark.parametrize("spec", ["clipp", "clip,clip", "hpsv2,"])
def test_what_get_reward_refuses_is_refused(spec):
    with pytest.raises(ValueError) as expected:
        get_reward(spec)
    with pytest.raises(ValueError) as error:
        architecture_reward(spec, torch.float32)
    assert str(error.value) == str(expected.value)
