"""Decoder and reward in pieces give the same results as at once.

Tolerance: float64, so results that differ only by the order of sums agree to 1e-12.
"""

import pytest
import torch
from torch import nn

from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import Block, run_decoder_stage, score_in_chunks


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 6)).double()


@pytest.mark.parametrize("stage", ["batch", "image"])
@pytest.mark.parametrize("option", [BlockOption.KEEP, BlockOption.RECOMPUTE])
def test_a_decoder_by_image_equals_it_at_once(stage, option):
    net, x = make_net(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    blocks = [Block("b", net[2], "decoder")]
    grad = torch.autograd.grad(run_decoder_stage(net, x, stage, {"b": option}, blocks).sin().sum(), x)[0]
    assert torch.allclose(grad, torch.autograd.grad(net(x).sin().sum(), x)[0], atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(run_decoder_stage(net, x, stage, {}, blocks), net(x), atol=1e-12)


def test_a_decoder_has_no_other_stages():
    with pytest.raises(ValueError, match="batch, image or bands"):
        run_decoder_stage(make_net(), torch.zeros(1, 6, dtype=torch.float64), "tile", {})


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_scores_in_chunks_equal_those_at_once(chunk):
    net, images = make_net(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]

    def score(images, prompts, metadata):
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        scores = net(images).sum(1) * lengths
        return scores, {"scores": scores.detach(), "mean": scores.mean().item(), "note": "same"}

    whole, info = score(images, prompts, prompts)
    scores, parts = score_in_chunks(score, chunk, images, prompts, prompts)
    assert torch.allclose(scores, whole, atol=1e-12) and torch.allclose(parts["scores"], info["scores"], atol=1e-12)
    assert parts["mean"] == pytest.approx(info["mean"]) and parts["note"] == "same"
    grads = [torch.autograd.grad(s.sum(), images)[0] for s in (scores, whole)]
    assert torch.allclose(*grads, atol=1e-12)
