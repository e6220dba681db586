"""A chain as one autograd function against plain autograd through the same steps.

Tolerance: float64, so results that differ only by the order of sums agree to 1e-10.
"""

import pytest
import torch
from torch import nn

from alignprop_fast.planner import BlockOption, GraphUse, Plan
from alignprop_fast.runtime import (
    Block,
    Chain,
    PeakMeter,
    run_chain,
    run_penalised_chain,
)

CPU = torch.device("cpu")
GATES = [(1.0, 1.0), (1.0, 0.0), (0.7, 0.3)]  # weight and input scale


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 6)).double()


class Steps(Chain):
    """x_next = 0.9 x + 0.2 y with y = net((i + 1) x). gate: weight and input scale of every step."""

    def __init__(self, net, gate=(1.0, 1.0), **options):
        self.gate = gate
        blocks = [Block("first", net[0], "transformers"), Block("second", net[2], "residuals")]
        super().__init__(5, list(net.parameters()), blocks, **options)
        self.net = net

    def predict(self, i, x):
        return self.net(x * (i + 1))

    def advance(self, i, x, y):
        return 0.9 * x + 0.2 * y

    def adjoint(self, i, g, y_dtype):
        return 0.9 * g, (0.2 * self.gate[0] * g).to(y_dtype)

    def input_scale(self, i):
        return self.gate[1]

    def plainly(self, i, x):
        """y of an open step in plain autograd."""
        weight, input_scale = self.gate
        y = self.net((input_scale * x + (1 - input_scale) * x.detach()) * (i + 1))
        return weight * y + (1 - weight) * y.detach()


class Penalised(Steps):
    """With the squared distance from y to a target as penalty."""

    def __init__(self, net, target, gate):
        super().__init__(net, gate, has_penalty=True)
        self.target = target

    def penalty(self, i, x, y):
        return (y - self.target).square().sum(), 2 * (y - self.target)


@pytest.mark.parametrize("grad_steps", [(0, 1, 2, 3, 4), (1, 3), (4,), (0,)])
@pytest.mark.parametrize("resident", [0, 1, 5])
@pytest.mark.parametrize("option", [BlockOption.KEEP, BlockOption.RECOMPUTE])
@pytest.mark.parametrize("gate", GATES)
def test_chain_equals_plain_autograd(grad_steps, resident, option, gate):
    net, x0 = make_net(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    cut = max(len(grad_steps) - resident, 0)
    options = {"*": option}
    plan = Plan(5, grad_steps[cut:], grad_steps[:cut], (options,) * len(grad_steps[cut:]), options)
    wanted = [x0, *net.parameters()]
    chain = Steps(net, gate)
    ours = torch.autograd.grad(run_chain(chain, plan, x0).sin().sum(), wanted)
    x = x0
    for i in range(5):
        y = chain.plainly(i, x)
        x = 0.9 * x + 0.2 * (y if i in grad_steps else y.detach())
    for a, b in zip(ours, torch.autograd.grad(x.sin().sum(), wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("grad_steps", [(0, 1, 2, 3, 4), (1, 3), (4,)])
@pytest.mark.parametrize("resident", [0, 1, 5])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("used", ["both", "penalty", "latents"])
def test_penalty_acts_through_its_own_step_alone(grad_steps, resident, gate, used):
    net, x0 = make_net(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 6, dtype=torch.float64)
    cut = max(len(grad_steps) - resident, 0)
    options = {"*": BlockOption.RECOMPUTE}
    plan = Plan(5, grad_steps[cut:], grad_steps[:cut], (options,) * len(grad_steps[cut:]), options)
    chain = Penalised(net, target, gate)
    wanted = [x0, *net.parameters()]

    def total(x, penalty):
        return (used != "penalty") * x.sin().sum() + 0.3 * (used != "latents") * penalty

    out, penalty = run_penalised_chain(chain, plan, x0)
    losses = {"both": lambda: total(out, penalty), "penalty": lambda: 0.3 * penalty, "latents": lambda: out.sin().sum()}
    ours = torch.autograd.grad(losses[used](), wanted)
    x, expected = x0, 0.0
    for i in range(5):
        y = chain.plainly(i, x)
        if i in grad_steps:
            expected = expected + (net(x.detach() * (i + 1)) - target).square().sum()
        x = 0.9 * x + 0.2 * (y if i in grad_steps else y.detach())
    assert torch.allclose(penalty, expected, atol=1e-10)
    for a, b in zip(ours, torch.autograd.grad(total(x, expected), wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_chain_keeps_nothing_it_does_not_need():
    """If the input needs no gradient, steps before the first gradient step keep nothing."""
    chain, x0 = Steps(make_net()), torch.randn(3, 6, dtype=torch.float64)
    with PeakMeter(CPU) as meter:
        out = run_chain(chain, Plan(5, (), (4,)), x0)
        assert out.requires_grad and meter.live_bytes() == 2 * x0.numel() * 8


def test_autocast_of_the_forward_pass_holds_in_the_backward_pass():
    net, x0 = make_net().float(), torch.randn(3, 6)
    seen = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = run_chain(Steps(net), Plan(5, (), (3, 4)), x0)
    out.float().sum().backward()
    assert seen == [torch.bfloat16] * 7


class Weighted(Chain):
    """x_next = x + y with y = a weight times a number that belongs to the step."""

    def __init__(self, weight, factors):
        super().__init__(len(factors), [weight])
        self.weight, self.factors = weight, factors

    def predict(self, i, x):
        return self.weight * self.factors[i]

    def advance(self, i, x, y):
        return x + y.float()

    def adjoint(self, i, g, y_dtype):
        return g, g.to(y_dtype)


def test_sums_of_low_precision_gradients_are_taken_in_fp32():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    chain = Weighted(weight, [1.0, 1.0, 256.0])
    run_chain(chain, Plan(3, (), (0, 1, 2)), torch.zeros(1)).sum().backward()
    # In bf16 256 + 1 is 256, twice.
    assert weight.grad.item() == 258.0


class Faster(Steps):
    """Counts the calls of the faster forms."""

    def __init__(self, net):
        super().__init__(net)
        self.calls = []

    def sample(self, i, x, recorded):
        self.calls.append(("sample", i, recorded))
        return self.predict(i, x)

    def recorded_gradients(self, i, x, gy, options):
        self.calls.append(("replay", i, options["*"]))
        return None  # no memory to record: the step runs again without


@pytest.mark.parametrize(
    ("use", "option", "replays"),
    [
        (GraphUse.NONE, BlockOption.RECOMPUTE, []),
        (GraphUse.SAMPLING, BlockOption.RECOMPUTE, []),
        (GraphUse.ALL, BlockOption.RECOMPUTE, [("replay", 2, "recompute")]),
        (GraphUse.ALL, BlockOption.RECOMPUTE_OFFLOADED, []),  # copies to the host are not recorded
    ],
)
def test_faster_forms_serve_steps_without_gradient_and_replays(use, option, replays):
    """A resident step keeps its graph, so `predict` runs once. A replayed step is sampled first."""
    chain = Faster(make_net())
    plan = Plan(5, (4,), (2,), ({"*": BlockOption.KEEP},), {"*": option}, graphs=use)
    run_chain(chain, plan, torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    assert chain.calls == [*(("sample", i, use is not GraphUse.NONE) for i in range(4)), *replays]
