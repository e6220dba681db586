"""Meters, checkpointed modules and decoding by image, on real PyTorch modules.

Tolerance: float64, so results that differ by the order of sums alone agree to 1e-10.
"""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from alignprop_fast.planner import Plan
from alignprop_fast.runtime import (
    Block,
    Chain,
    PeakMeter,
    Stopwatch,
    apply_options,
    run_chain,
    run_decoder_stage,
    run_penalised_chain,
    score_in_chunks,
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
        blocks=[Block("first", net[0], "transformers"), Block("second", net[2], "residuals")],
    )


@pytest.mark.parametrize("grad_steps", [(0, 1, 2, 3, 4), (1, 3), (4,), (0,)])
@pytest.mark.parametrize("resident", [0, 1, 5])
@pytest.mark.parametrize("option", ["keep", "recompute"])
@pytest.mark.parametrize("through_input", [True, False])
def test_chain_equals_plain_autograd(grad_steps, resident, option, through_input):
    net, x0 = make_net(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    cut = max(len(grad_steps) - resident, 0)
    options = {"*": option}
    plan = Plan(5, grad_steps[cut:], grad_steps[:cut], (options,) * len(grad_steps[cut:]), options)
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
    options = {"*": "recompute"}
    plan = Plan(5, grad_steps[cut:], grad_steps[:cut], (options,) * len(grad_steps[cut:]), options)
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


def test_apply_options_saves_memory_and_leaves_no_trace():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)))
    blocks = [Block(str(k), module, "residuals") for k, module in enumerate(net)]
    x = torch.randn(128, 64)
    kept, grads = [], []
    for option in ("keep", "recompute"):
        net.zero_grad()
        with PeakMeter(CPU) as meter:
            with apply_options({"*": option}, blocks):
                loss = net(x).square().sum()
            kept.append(meter.live_bytes())
        loss.backward()
        grads.append(net[0][0].weight.grad.clone())
    assert kept[1] < kept[0] / 4 and torch.equal(*grads)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_apply_options_gives_a_modules_own_forward_back():
    layer = nn.Linear(2, 2)
    layer.forward = own = lambda x: x * 2
    with apply_options({"layer": "recompute"}, [Block("layer", layer, "residuals")]):
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0)) and layer.forward is not own
    assert layer.forward is own


@pytest.mark.parametrize("stage", ["batch", "image"])
@pytest.mark.parametrize("option", ["keep", "recompute"])
def test_by_image(stage, option):
    net, x = make_net(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    blocks = [Block("b", net[2], "decoder")]
    grad = torch.autograd.grad(run_decoder_stage(net, x, stage, {"b": option}, blocks).sin().sum(), x)[0]
    assert torch.allclose(grad, torch.autograd.grad(net(x).sin().sum(), x)[0], atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(run_decoder_stage(net, x, stage, {}, blocks), net(x), atol=1e-12)


def test_by_image_refuses_other_stages():
    with pytest.raises(ValueError, match="batch, image or bands"):
        run_decoder_stage(make_net(), torch.zeros(1, 6, dtype=torch.float64), "tile", {})


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_in_chunks(chunk):
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


def test_stopwatch_tells_parts_apart():
    watch = Stopwatch(CPU)
    for label, naps in (("a", 1), ("b", 4), ("a", 1)):
        watch.enter(label)
        time.sleep(0.01 * naps)
    seconds = watch.seconds()
    # Sleeping takes no less than asked for; how much more is the machine's affair.
    assert seconds["a"] >= 0.02 and seconds["b"] >= 0.04 and set(seconds) == {"a", "b"}
