"""Kinds of rewards: a function, a module, or a `Reward` that declares more."""

import pytest
import torch
from torch import nn

from alignprop_fast import DifferentiableSampler
from alignprop_fast.rewards import FunctionReward, Reward, WeightedSum, as_reward
from alignprop_fast.rewards.mixture import Part
from alignprop_fast.rewards.normalise import NormalisedSum

IMAGES, PROMPTS = torch.rand(2, 3, 4, 4), ["a", "b"]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images, prompts, metadata):
        return (images * self.weight[:, None, None]).mean((1, 2, 3)), {"size": len(images)}


class ModuleReward(Reward, nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def __call__(self, images, prompts, metadata):
        return self.network(images, prompts, metadata)


class Observer(Reward):
    observes = True

    def __init__(self):
        self.seen = []

    def __call__(self, images, prompts, metadata):
        return brightness(images, prompts, metadata), {"own": images.amax((1, 2, 3))}

    def observe(self, info):
        self.seen.append(info)


class Sharp(Reward):
    by_image = True

    def __init__(self):
        self.network = Network()

    def __call__(self, images, prompts, metadata):
        return self.network(images, prompts, metadata)

    def weight_bytes(self):
        return 1000


def test_a_function_is_enough():
    reward = as_reward(brightness)
    scores, info = reward(IMAGES, PROMPTS, [{}, {}])
    assert torch.equal(scores, IMAGES.mean((1, 2, 3))) and info == {}
    assert not reward.by_image and not reward.observes
    assert reward.weight_bytes() == 0 and reward.state() == as_reward(brightness).state()
    assert FunctionReward(brightness, by_image=True).by_image


@pytest.mark.parametrize("scorer", [Network, ModuleReward])
def test_a_modules_weights_count_and_are_watched(scorer):
    network = scorer()
    reward = as_reward(network)
    assert reward.weight_bytes() == 12 and reward(IMAGES, PROMPTS, [{}, {}])[1] == {"size": 2}
    before = reward.state()
    with torch.no_grad():
        next(network.parameters()).mul_(2)
    assert reward.state() != before


def test_a_reward_of_ones_own_stays_what_it_is():
    own = Sharp()
    assert as_reward(own) is own and own.state() == () and not own.observes
    with pytest.raises(TypeError, match="abstract"):
        Reward()
    with pytest.raises(NotImplementedError):
        own.observe({})


def test_a_mixture_asks_its_parts():
    own = WeightedSum([Part("own", 1.0, Sharp()), Part("network", 1.0, Network(), by_image=True)])
    assert own.by_image and own.weight_bytes() == 1012
    assert not WeightedSum([Part("own", 1.0, Sharp()), Part("bright", 1.0, brightness)]).by_image


@pytest.mark.parametrize("mixture", [WeightedSum, NormalisedSum])
def test_a_mixture_tells_the_parts_that_observe(mixture):
    first, second = Observer(), Observer()
    reward = mixture([Part("a", 1.0, first), Part("b", 1.0, second), Part("bright", 1.0, brightness)])
    _, info = reward(IMAGES, PROMPTS, [{}, {}])
    assert reward.observes
    reward.observe({**info, "a/own": info["a/own"] + 1})
    for observer, added in ((first, 1), (second, 0)):
        (seen,) = observer.seen
        assert torch.equal(seen["own"], IMAGES.amax((1, 2, 3)) + added) and torch.equal(seen["b"], info["b"])
    assert not WeightedSum([Part("bright", 1.0, brightness)]).observes


def test_the_sampler_counts_what_a_reward_says_of_itself(tiny_sd):
    assert DifferentiableSampler(tiny_sd, 2, reward=Sharp()).reward_bytes == 1000
    assert DifferentiableSampler(tiny_sd, 2, reward=Network()).reward_bytes == 12
    assert DifferentiableSampler(tiny_sd, 2, reward=Sharp(), reward_bytes=7).reward_bytes == 7
    assert DifferentiableSampler(tiny_sd, 2, reward=brightness).reward_bytes == 0
