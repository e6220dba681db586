"""Muon's steps: their direction is orthogonal, their size and decay are those of AdamW."""

import pytest
import torch

from alignprop_fast.making.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_come_close_to_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    # Five iterations with these coefficients lead to about 0.7 to 1.2 (the page named in the source).
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_step_has_the_size_of_adamw():
    parameter = torch.nn.Parameter(torch.zeros(32, 4, 3, 3))
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    Muon([parameter], lr=0.5, weight_decay=0.0).step()
    # Arxiv 2502.16982 scales to a root mean square of 0.2; singular values of 0.7 to 1.2 leave it 40 % of room.
    assert parameter.detach().square().mean().sqrt() == pytest.approx(0.5 * 0.2, rel=0.4)
    assert (parameter * parameter.grad).sum() < 0


def test_weights_decay():
    parameter = torch.nn.Parameter(torch.ones(24, 24))
    parameter.grad = torch.zeros_like(parameter)
    Muon([parameter], lr=0.5, weight_decay=0.1).step()
    assert parameter.detach().allclose(torch.tensor(0.95))
