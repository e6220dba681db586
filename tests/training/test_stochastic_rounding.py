"""Stochastic rounding: exact on average, reproducible from the seed, and small updates are not lost."""

import copy

import pytest
import torch

from alignprop_fast.training.optimizers import make_optimizer, state_bytes
from alignprop_fast.training.stochastic_rounding import RoundedOptimizer, stochastic_round


def test_the_mean_of_many_roundings_is_the_value():
    x = torch.tensor([1.001, -1.001, 3e-5, -0.333, 0.0, 1.0, 1e-30, 255.9]).repeat(40_000, 1)
    rounded = stochastic_round(x, torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    step = 2.0**-7 * x[0].abs()  # at most the distance of two neighbours
    assert ((rounded.double() - x).abs() <= step).all(), "a neighbour, and no other"
    mean = rounded.double().mean(dim=0)
    assert ((mean - x[0]).abs() <= 5 * step / 2 / 40_000**0.5).all()
    exact = x[0].to(torch.bfloat16) == x[0]
    assert exact.sum() == 2 and torch.equal(rounded[:, exact].float(), x[:, exact])


def rounded_sgd(parameter, rate, seed=0):
    return RoundedOptimizer(lambda tensors: torch.optim.SGD(tensors, lr=rate), [parameter], seed)


def moved(optimizer, parameter, steps):
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return 1 - parameter.detach().float().mean().item()


def test_small_updates_do_not_stall():
    """Each update is 1/2000 of the weight, a quarter of half the distance to the next bf16 number."""
    plain, rounded = (torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2))
    assert moved(torch.optim.SGD([plain], lr=5e-4), plain, 200) == 0
    assert moved(rounded_sgd(rounded, 5e-4), rounded, 200) == pytest.approx(0.1, rel=0.02)


def test_the_seed_decides():
    def run(seed):
        parameter = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        torch.rand(3)  # training's own random numbers have no effect
        moved(rounded_sgd(parameter, 1e-3, seed), parameter, 20)
        return parameter.detach()

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_state_is_fp32_and_copies_live_in_the_step_alone():
    parameter = torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    optimizer = RoundedOptimizer(lambda tensors: make_optimizer("adamw", tensors, learning_rate=0.1), [parameter], 0)
    moved(optimizer, parameter, 2)
    assert state_bytes(optimizer) == 8 * 5000 + 4
    assert all(wide.numel() == 0 and wide.grad is None for wide in optimizer._wide)
    assert [group["params"] for group in optimizer.param_groups] == [[parameter]]


def test_it_goes_on_exactly_from_its_state():
    def fresh(value):
        parameter = torch.nn.Parameter(value.clone())
        make = lambda tensors: make_optimizer("adamw", tensors, learning_rate=1e-3)  # noqa: E731
        return parameter, RoundedOptimizer(make, [parameter], 7)

    parameter, optimizer = fresh(torch.ones(512, dtype=torch.bfloat16))
    moved(optimizer, parameter, 5)
    state, middle = copy.deepcopy(optimizer.state_dict()), parameter.detach().clone()
    moved(optimizer, parameter, 5)
    resumed, other = fresh(middle)
    other.load_state_dict(state)
    moved(other, resumed, 5)
    assert torch.equal(resumed, parameter)
