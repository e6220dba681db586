"""Running normalisation: the gradient equals the formula's; values do not change, nor do calls without gradient."""

import math

import torch

from alignprop_fast.rewards.mixture import Part, WeightedSum
from alignprop_fast.rewards.normalise import DECAY, NormalisedSum


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)), {}


def large(images, prompts, metadata):
    return 1000 * images.square().mean(dim=(1, 2, 3)) + 5000, {}


PARTS = (Part("bright", 1.0, brightness), Part("large", -0.5, large))


def batches(count, size=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(count)]


def graded(reward, images):
    images = images.clone().requires_grad_()
    scores, info = reward(images, [""] * len(images), [{}] * len(images))
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0], info


def deviation(part, seen):
    weights = [DECAY ** (len(seen) - 1 - j) for j in range(len(seen))]
    scores = [part.reward(batch, None, None)[0] for batch in seen]
    first, second = (
        sum(w * (s**power).mean() for w, s in zip(weights, scores, strict=True)) / sum(weights) for power in (1, 2)
    )
    return (second - first**2).sqrt(), first


def test_gradient_is_that_of_the_formula():
    reward, seen = NormalisedSum(PARTS), []
    for images in batches(6):
        scores, gradient, info = graded(reward, images)
        leaf, expected = images.clone().requires_grad_(), 0.0
        for part in PARTS:
            scale, mean = deviation(part, seen or [images])
            expected = expected + part.weight * (part.reward(leaf, None, None)[0] - mean) / scale
        assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-6, atol=0)
        plain, _, plain_info = graded(WeightedSum(PARTS), images)
        assert torch.allclose(scores, plain) and all(torch.equal(info[name], plain_info[name]) for name in info)
        reward.observe(info)
        seen.append(images)


def test_calls_change_nothing_and_may_be_cut():
    reward, (first, images) = NormalisedSum(PARTS), batches(2)
    reward.observe(graded(reward, first)[2])
    before = reward.state_dict()
    whole = graded(reward, images)[1]
    parts = [graded(reward, chunk)[1] for chunk in images.split(1)]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-9) and reward.state_dict() == before
    with torch.no_grad():
        scores, _ = reward(images.clone().requires_grad_(), [""] * 4, [{}] * 4)
    assert torch.equal(scores, WeightedSum(PARTS)(images, [""] * 4, [{}] * 4)[0])


def test_scores_that_are_alike_are_not_scaled_and_broken_ones_not_counted():
    reward, one = NormalisedSum(PARTS), batches(1, size=1)[0]
    for _ in range(2):
        _, gradient, info = graded(reward, one)
        assert torch.equal(gradient, graded(WeightedSum(PARTS), one)[1])
        reward.observe(info)
    before = reward.state_dict()
    reward.observe(graded(reward, one * math.nan)[2])
    assert reward.state_dict() == before


def test_its_state_goes_through_a_checkpoint(tmp_path):
    first, second = NormalisedSum(PARTS), NormalisedSum((*PARTS, Part("new", 1.0, brightness)))
    *past, last = batches(4)
    for images in past:
        first.observe(graded(first, images)[2])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    new = graded(NormalisedSum(PARTS[:1]), last)[1]  # a part that the checkpoint does not know begins anew
    assert torch.allclose(graded(second, last)[1], graded(first, last)[1] + new, rtol=1e-9)
