"""Meters, checkpointed modules and decoding by image, on real PyTorch modules.

Tolerance: float64, so results that differ by the order of sums alone agree to 1e-10.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from alignprop_fast.planner import Option, Plan
from alignprop_fast.runtime import (
    Chain,
    PeakMeter,
    apply_by_image,
    checkpointed,
    measure_option,
    measure_segment,
    run_chain,
    run_penalised_chain,
)

CPU = torch.device("cpu")


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 6)).double()


def make_chain(net):
    return Chain(
        num_steps=5,
        network=lambda i, x: net(x * (i + 1)),
        advance=lambda i, x, y: 0.9 * x + 0.2 * y,
        adjoint=lambda i, g, dtype: (0.9 * g, (0.2 * g).to(dtype)),
        parameters=list(net.parameters()),
        groups={"transformers": [net[0]], "residuals": [net[2]]},
    )


@pytest.mark.parametrize("grad_steps", [(0, 1, 2, 3, 4), (1, 3), (4,), (0,)])
@pytest.mark.parametrize("resident", [0, 1, 5])
@pytest.mark.parametrize("option", ["keep", "recompute"])
@pytest.mark.parametrize("through_input", [True, False])
def test_chain_equals_plain_autograd(grad_steps, resident, option, through_input):
    net, x0 = make_net(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    cut = max(len(grad_steps) - resident, 0)
    options = {"step": option}
    plan = Plan(5, grad_steps[cut:], grad_steps[:cut], options, options)
    wanted = [x0, *net.parameters()]
    chain = replace(make_chain(net), input_gradient=through_input)
    ours = torch.autograd.grad(run_chain(chain, plan, x0).sin().sum(), wanted)
    x = x0
    for i in range(5):
        y = net((x if through_input else x.detach()) * (i + 1))
        x = 0.9 * x + 0.2 * (y if i in grad_steps else y.detach())
    for a, b in zip(ours, torch.autograd.grad(x.sin().sum(), wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("grad_steps", [(0, 1, 2, 3, 4), (1, 3), (4,)])
@pytest.mark.parametrize("resident", [0, 1, 5])
@pytest.mark.parametrize("through_input", [True, False])
@pytest.mark.parametrize("used", ["both", "penalty", "latents"])
def test_penalty_acts_through_its_own_step_alone(grad_steps, resident, through_input, used):
    net, x0 = make_net(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 6, dtype=torch.float64)
    cut = max(len(grad_steps) - resident, 0)
    plan = Plan(5, grad_steps[cut:], grad_steps[:cut], {"step": "recompute"}, {"step": "recompute"})
    chain = replace(
        make_chain(net),
        input_gradient=through_input,
        penalty=lambda i, x, y: ((y - target).square().sum(), 2 * (y - target)),
    )
    wanted = [x0, *net.parameters()]

    def total(x, penalty):
        return (used != "penalty") * x.sin().sum() + 0.3 * (used != "latents") * penalty

    out, penalty = run_penalised_chain(chain, plan, x0)
    losses = {"both": lambda: total(out, penalty), "penalty": lambda: 0.3 * penalty, "latents": lambda: out.sin().sum()}
    ours = torch.autograd.grad(losses[used](), wanted)
    x, expected = x0, 0.0
    for i in range(5):
        y = net((x if through_input else x.detach()) * (i + 1))
        if i in grad_steps:
            expected = expected + (net(x.detach() * (i + 1)) - target).square().sum()
        x = 0.9 * x + 0.2 * (y if i in grad_steps else y.detach())
    assert torch.allclose(penalty, expected, atol=1e-10)
    for a, b in zip(ours, torch.autograd.grad(total(x, expected), wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_chain_keeps_nothing_it_does_not_need():
    """No gradient of the input wanted: steps before the first gradient step leave nothing behind."""
    chain, x0 = make_chain(make_net()), torch.randn(3, 6, dtype=torch.float64)
    with PeakMeter(CPU) as meter:
        out = run_chain(chain, Plan(5, (), (4,)), x0)
        assert out.requires_grad and meter.live_bytes() == 2 * x0.numel() * 8


def test_autocast_of_the_forward_pass_holds_in_the_backward_pass():
    net, x0 = make_net().float(), torch.randn(3, 6)
    seen = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = run_chain(make_chain(net), Plan(5, (), (3, 4)), x0)
    out.float().sum().backward()
    assert seen == [torch.bfloat16] * 7


def test_sums_of_low_precision_gradients_are_taken_in_fp32():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    contributions = [256.0, 1.0, 1.0]
    chain = Chain(
        3,
        network=lambda i, x: weight * contributions[2 - i],
        advance=lambda i, x, y: x + y.float(),
        adjoint=lambda i, g, dtype: (g, g.to(dtype)),
        parameters=[weight],
    )
    run_chain(chain, Plan(3, (), (0, 1, 2)), torch.zeros(1)).sum().backward()
    # In bf16 256 + 1 is 256, twice.
    assert weight.grad.item() == 258.0


def test_checkpointed_saves_memory_and_leaves_no_trace():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)))
    x = torch.randn(128, 64)
    kept, grads = [], []
    for modules in ((), list(net)):
        net.zero_grad()
        with PeakMeter(CPU) as meter:
            with checkpointed(modules):
                loss = net(x).square().sum()
            kept.append(meter.live_bytes())
        loss.backward()
        grads.append(net[0][0].weight.grad.clone())
    assert kept[1] < kept[0] / 4 and torch.equal(*grads)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_checkpointed_gives_a_modules_own_forward_back():
    layer = nn.Linear(2, 2)
    layer.forward = own = lambda x: x * 2
    with checkpointed([layer]):
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))
    assert layer.forward is own


@pytest.mark.parametrize("option", ["keep", "image", "block"])
def test_apply_by_image(option):
    net, x = make_net(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(apply_by_image(net, x, option, [net[2]]).sin().sum(), x)[0]
    assert torch.allclose(grad, torch.autograd.grad(net(x).sin().sum(), x)[0], atol=1e-12)


def test_apply_by_image_refuses_other_options():
    with pytest.raises(ValueError, match="block"):
        apply_by_image(make_net(), torch.zeros(1, 6, dtype=torch.float64), "tile")


def test_peak_meter_counts_what_is_made_inside():
    outside = torch.ones(1000)
    with PeakMeter(CPU) as meter:
        a = outside + 1
        view = a[10:]
        b = a * 2
        assert meter.live_bytes() == 8000
        del a
        assert meter.live_bytes() == 8000
        del view
        assert meter.live_bytes() == 4000
        outside.add_(1)
        outside.view(10, 100).t()
        del b
    assert meter.peak_bytes == 8000


def test_measuring_stops_where_nothing_richer_can_fit():
    sizes = {"lean": 10, "middle": 60, "rich": 100, "richest": 200}
    tried = []

    def measure(name):
        tried.append(name)
        return measure_option(
            name, lambda: torch.zeros(sizes[name], requires_grad=True) * 1, lambda y: y.sum().backward(), CPU
        )

    segment = measure_segment("s", [*sizes], measure, limit_bytes=4 * 150)
    assert [option.name for option in segment.options] == tried
    assert tried[0] == "lean" and "richest" not in tried
    assert segment.options[-1].kept_bytes + segment.options[-1].transient_bytes > 4 * 150


def test_measuring_takes_a_lack_of_memory_for_an_answer():
    def measure(name):
        if name != "lean":
            raise torch.OutOfMemoryError("full")
        return Option(name, 1, 1, 1.0)

    assert [option.name for option in measure_segment("s", ["lean", "rich"], measure, 100).options] == ["lean"]
    with pytest.raises(torch.OutOfMemoryError):
        measure_segment("s", ["rich"], measure, 100)
