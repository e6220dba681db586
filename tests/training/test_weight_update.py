"""After an optimizer step both learning rate and average have advanced, or neither."""

import math
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from alignprop_fast.planner.optimizer_state import merges
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.flat_parameters import FlatParameters
from alignprop_fast.training.optimizers import make_optimizer
from alignprop_fast.training.weight_update import WeightUpdate

STEPS = 6


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState

    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(64, 80), (80, 4)]]


def make_update(accelerator, trained, **options):
    config = AlignPropConfig(**{"mixed_precision": "no", "num_epochs": STEPS, "train_learning_rate": 1e-2, **options})
    return WeightUpdate(config, accelerator, trained, not config.optimizer_in_backward)


def gradients(trained, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(parameter.shape, generator=generator) for parameter in trained]


def one_step(update, trained, step, factor=1.0):
    """A backward pass and an optimizer step; returns the learning rate of the step."""
    rate = update.learning_rate
    update.begin_backward(last=True)
    update.backward(sum((p * g).sum() for p, g in zip(trained, gradients(trained, step), strict=True)) * factor)
    update.step()
    update.zero_grad()
    return rate


def rates_of_library(name, warmup_steps, steps=STEPS):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


OPTIMIZERS = [
    "adamw",
    "adafactor",
    *(["adamw8bit"] if find_spec("bitsandbytes") else []),
    *(["prodigy"] if find_spec("prodigyopt") else []),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_made_with_the_library_s_learning_rate(accelerator, name):
    """The weights equal those of the bare optimizer under the library's scheduler to the bit, also with an average that
    replaces them for a while."""
    found, expected = parameters(), parameters()
    options = {"lr_scheduler": "cosine", "warmup_steps": 2, "ema_decay": 0.9, "train_max_grad_norm": 1e9}
    update = make_update(accelerator, found, optimizer=name, **options)
    flat = FlatParameters(expected, merges(name))
    optimizer = make_optimizer(name, flat.tensors, learning_rate=1e-2)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    for step in range(STEPS):
        rate = one_step(update, found, step)
        assert rate == optimizer.param_groups[0]["lr"]
        for parameter, grad in zip(expected, gradients(expected, step), strict=True):
            parameter.grad = grad
        flat.join_gradients()
        optimizer.step()
        scheduler.step()
        with update.averaged():
            pass
    assert all(map(torch.equal, found, expected))


def test_an_infinite_norm_clips_nothing(accelerator):
    """To the bit, whatever the size of the gradients."""
    found, expected = parameters(), parameters()
    update = make_update(accelerator, found, train_max_grad_norm=math.inf)
    flat = FlatParameters(expected, merges("adamw"))
    optimizer = make_optimizer("adamw", flat.tensors, learning_rate=1e-2)
    for scale in (1e-20, 1.0, 1e10):
        update.begin_backward(last=True)
        for own, other, grad in zip(found, expected, gradients(found, 0), strict=True):
            own.grad, other.grad = scale * grad, scale * grad
        assert math.isfinite(update.step())
        flat.join_gradients()
        optimizer.step()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_rates_of_a_run_are_the_library_s(accelerator, name, warmup_steps):
    trained = parameters()
    update = make_update(accelerator, trained, lr_scheduler=name, warmup_steps=warmup_steps)
    rates = [one_step(update, trained, step) for step in range(STEPS)]
    theirs = "constant_with_warmup" if name == "constant" else name
    assert rates == rates_of_library(theirs, warmup_steps)
    assert rates[warmup_steps] == 1e-2 and (rates[0] == 0) == (warmup_steps > 0)


@pytest.mark.parametrize("kind", ["plain", "bf16", "in backward"])
def test_every_optimizer_inside_gets_the_rate(accelerator, kind):
    options = {"bf16": {"adapter_dtype": "bf16"}, "in backward": {"optimizer_in_backward": True}}.get(kind, {})
    trained = parameters(torch.bfloat16 if kind == "bf16" else torch.float32)
    update = make_update(accelerator, trained, lr_scheduler="linear", warmup_steps=1, **options)
    before = [parameter.detach().clone() for parameter in trained]
    one_step(update, trained, 0)
    assert all(map(torch.equal, trained, before)), "a learning rate of 0 changes nothing"
    update.load_state_dict(update.state_dict())  # gives optimizers new groups
    one_step(update, trained, 1)
    assert not any(map(torch.equal, trained, before))
    inner = update.optimizer.optimizer
    inside = {"bf16": lambda: [inner._inner], "in backward": lambda: inner._optimizers.values()}
    groups = [group for one in inside.get(kind, lambda: [inner])() for group in one.param_groups]
    assert len(groups) == (2 if kind == "in backward" else 1) and {group["lr"] for group in groups} == {1e-2}


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_not_made_moves_neither_rate_nor_average(accelerator, scaled):
    """With a gradient scaler the step itself finds the overflow and does not change the weights."""
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trained = parameters()
    update = make_update(accelerator, trained, lr_scheduler="linear", ema_decay=0.9, train_max_grad_norm=1e9)
    one_step(update, trained, 0)
    average = [tensor.clone() for tensor in update.average.state_dict()["weights"]]
    before, rate = [parameter.detach().clone() for parameter in trained], update.learning_rate
    one_step(update, trained, 1, factor=float("inf"))
    assert (update.updates, update.learning_rate) == (1, rate)
    assert all(map(torch.equal, trained, before))
    assert all(map(torch.equal, average, update.average.state_dict()["weights"]))
    one_step(update, trained, 2)
    assert update.updates == 2 and update.learning_rate < rate
    assert not any(map(torch.equal, average, update.average.state_dict()["weights"]))


def test_what_an_older_checkpoint_lacks_begins_anew(accelerator):
    trained = parameters()
    update = make_update(accelerator, trained, lr_scheduler="linear", ema_decay=0.9)
    one_step(update, trained, 0)
    old = {name: value for name, value in update.state_dict().items() if name in ("optimizer", "scaler")}
    update.load_state_dict(old)
    assert update.updates == 0
    [average] = update.average.state_dict()["weights"]
    assert torch.equal(average, update.weights.tensors[0])
