"""Options of blocks, on real PyTorch modules."""

import torch
from torch import nn

from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import Block, PeakMeter, apply_options

CPU = torch.device("cpu")


def test_apply_options_saves_memory_and_leaves_no_trace():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)))
    blocks = [Block(str(k), module, "residuals") for k, module in enumerate(net)]
    x = torch.randn(128, 64)
    kept, grads = [], []
    for option in (BlockOption.KEEP, BlockOption.RECOMPUTE):
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
    with apply_options({"layer": BlockOption.RECOMPUTE}, [Block("layer", layer, "residuals")]):
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0)) and layer.forward is not own
    assert layer.forward is own
