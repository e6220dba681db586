"""Optimizers by name: each lowers a quadratic, has loadable state, and continues exactly from it."""

import io
import sys
from importlib.util import find_spec

import pytest
import torch

from alignprop_fast.planner.optimizer_state import OPTIMIZERS, merges, optimizer_bytes
from alignprop_fast.training.flat_parameters import FlatParameters
from alignprop_fast.training.optimizers import learning_rate_factor, make_optimizer, state_bytes

EIGHT_BIT = ("adamw8bit", "lion8bit", "ademamix8bit")
PACKAGES = {**dict.fromkeys(EIGHT_BIT, "bitsandbytes"), "prodigy": "prodigyopt"}
# Paged state needs an NVIDIA GPU.
AVAILABLE = [n for n in OPTIMIZERS if n != "pagedadamw8bit" and (n not in PACKAGES or find_spec(PACKAGES[n]))]
RATES = {"prodigy": 1.0}


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
    optimizer = make_optimizer(name, [parameter], learning_rate=RATES.get(name, 0.05), weight_decay=0.0)
    first = _run(optimizer, parameter, target, 1)
    assert _run(optimizer, parameter, target, 90) < 0.2 * first


@pytest.mark.parametrize("name", AVAILABLE)
def test_state_is_loadable_with_weights_only_and_continues_exactly(name):
    parameter, target = _problem()
    optimizer = make_optimizer(name, [parameter], learning_rate=RATES.get(name, 0.05))
    _run(optimizer, parameter, target, 3)
    stream, middle = io.BytesIO(), parameter.detach().clone()
    torch.save(optimizer.state_dict(), stream)
    _run(optimizer, parameter, target, 3)
    stream.seek(0)
    resumed = torch.nn.Parameter(middle)
    other = make_optimizer(name, [resumed], learning_rate=RATES.get(name, 0.05))
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
    for ask in (lambda: make_optimizer("sgdd", [], learning_rate=0.1), lambda: optimizer_bytes("sgdd", [(2, 3)])):
        with pytest.raises(ValueError, match="adamw, adamw8bit, pagedadamw8bit, lion8bit"):
            ask()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", AVAILABLE)
def test_bytes_of_state_are_as_predicted(name, merge):
    """Adapters of rank 4, most of them under the 4096 elements from which bitsandbytes uses 8 bit, and a vector."""
    shapes = [(4, 320), (320, 4), (4, 1280), (1280, 4), (4, 64, 3, 3), (77,)]
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    flat = FlatParameters(parameters, merge=merge and merges(name))
    optimizer = make_optimizer(name, flat.tensors, learning_rate=0.01)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    flat.join_gradients()
    optimizer.step()
    assert state_bytes(optimizer) == optimizer_bytes(name, shapes, merge)
    count = sum(parameter.numel() for parameter in parameters)
    if name in EIGHT_BIT:
        per_element = state_bytes(optimizer) / count
        states = {"adamw8bit": 2, "lion8bit": 1, "ademamix8bit": 3}[name]
        assert per_element < 1.2 * states if merge else per_element > 2 * states


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_paged_state_needs_a_gpu():
    parameter, _ = _problem()
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU.*: use adamw8bit"):
        make_optimizer("pagedadamw8bit", [parameter], learning_rate=0.1)


@pytest.mark.parametrize(("name", "package"), [*PACKAGES.items()])
def test_a_missing_library_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{name} needs {package}: pip install {package}"):
        make_optimizer(name, [_problem()[0]], learning_rate=0.1)


@pytest.mark.parametrize(("name", "last"), [("constant", 1), ("linear", 0), ("cosine", 0)])
def test_a_schedule_stays_where_it_ended(name, last):
    """A trainer may be asked for more steps than its config says."""
    factor = learning_rate_factor(name, 2, 8)
    assert [factor(done) for done in (0, 1, 2)] == [0, 0.5, 1]
    assert [factor(done) for done in (8, 9, 12, 20)] == [last] * 4
