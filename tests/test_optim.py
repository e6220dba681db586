"""Optimizers by name: each lowers a quadratic, keeps loadable state, and goes on exactly from it."""

import io
from importlib.util import find_spec

import pytest
import torch

from alignprop_fast.optim import OPTIMIZERS, make_optimizer, state_bytes

AVAILABLE = [name for name in OPTIMIZERS if name != "adamw8bit" or find_spec("bitsandbytes")]


def _problem():
    torch.manual_seed(0)
    # 64 x 128 = 8192 elements: bitsandbytes keeps tensors under 4096 in 32 bit
    parameter = torch.nn.Parameter(torch.randn(64, 128))
    return parameter, torch.randn(64, 128)


def _run(optimizer, parameter, target, steps):
    for _ in range(steps):
        loss = ((parameter - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", AVAILABLE)
def test_lowers_a_quadratic(name):
    parameter, target = _problem()
    optimizer = make_optimizer(name, [parameter], learning_rate=0.05, weight_decay=0.0)
    first = _run(optimizer, parameter, target, 1)
    assert _run(optimizer, parameter, target, 60) < 0.2 * first


@pytest.mark.parametrize("name", AVAILABLE)
def test_state_is_loadable_with_weights_only_and_continues_exactly(name):
    parameter, target = _problem()
    optimizer = make_optimizer(name, [parameter], learning_rate=0.05)
    _run(optimizer, parameter, target, 3)
    stream, middle = io.BytesIO(), parameter.detach().clone()
    torch.save(optimizer.state_dict(), stream)
    _run(optimizer, parameter, target, 3)
    stream.seek(0)
    resumed = torch.nn.Parameter(middle)
    other = make_optimizer(name, [resumed], learning_rate=0.05)
    other.load_state_dict(torch.load(stream, weights_only=True))
    _run(other, resumed, target, 3)
    assert torch.equal(resumed, parameter)


def test_adamw_is_torch_adamw_with_our_options():
    parameter, _ = _problem()
    optimizer = make_optimizer(
        "adamw", [parameter], learning_rate=0.3, betas=(0.8, 0.9), weight_decay=0.7, epsilon=1e-3
    )
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.3, (0.8, 0.9), 0.7, 1e-3)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="adamw, adamw8bit, adafactor"):
        make_optimizer("sgdd", [], learning_rate=0.1)


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_bytes_of_the_state_are_known_before_there_is_one(name):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (16, 3), (4, 8, 6), (300,))]
    optimizer = make_optimizer(name, parameters, learning_rate=0.01)
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    # Step counters aside, and the tables of the 8-bit format, which all parameters share.
    held = sum(t.numel() * t.element_size() for t in tensors if t.ndim and t.numel() != 256)
    assert state_bytes(name, parameters) == held
    with pytest.raises(ValueError, match="unknown optimizer"):
        state_bytes("sgd", parameters)
