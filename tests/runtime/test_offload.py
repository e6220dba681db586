"""Offloaded blocks: the same bits, kept tensors gone from the device, host buffers reused."""

import pytest
import torch
from torch import nn

from alignprop_fast.models.lean.quantization import QuantizedLinear, quantize_linears
from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import Block, HostPool, Offloader, PeakMeter, apply_options

CPU = torch.device("cpu")


def make_blocks(width=64):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(4)))
    net.requires_grad_(False)
    return net, [Block(str(k), module, "residuals") for k, module in enumerate(net)]


def run(net, blocks, x, option, offloader):
    with PeakMeter(CPU) as meter:
        with apply_options({"*": option}, blocks, offloader):
            y = net(x)
        offloader.settle()
        kept_bytes = meter.live_bytes() - y.numel() * y.element_size()
        grad = torch.autograd.grad(y.square().sum(), x)[0]
    return kept_bytes, grad


@pytest.mark.parametrize("grade", [BlockOption.KEEP, BlockOption.RECOMPUTE])
def test_bits_stay_and_the_device_is_freed(grade):
    net, blocks = make_blocks()
    offloader = Offloader(CPU, smallest_bytes=1)
    x = torch.randn(128, 64, requires_grad=True)
    kept_bytes, grad = run(net, blocks, x, grade, offloader)
    moved_bytes, moved = run(net, blocks, x, grade.offloaded, offloader)
    assert torch.equal(grad, moved)
    assert kept_bytes > 0 and moved_bytes == 0
    assert offloader.pool.size_bytes > 0


def test_host_buffers_are_used_again():
    net, blocks = make_blocks()
    offloader = Offloader(CPU, smallest_bytes=1)
    x = torch.randn(128, 64, requires_grad=True)
    sizes = []
    for _ in range(3):
        run(net, blocks, x, BlockOption.KEEP_OFFLOADED, offloader)
        sizes.append(offloader.pool.size_bytes)
    assert len(set(sizes)) == 1
    # Every block keeps the input of tanh's backward (its output) and nothing of the frozen linear layers.
    assert sizes[0] == 4 * 128 * 64 * 4


def test_a_graph_that_is_dropped_gives_its_buffers_back():
    net, blocks = make_blocks()
    offloader = Offloader(CPU, smallest_bytes=1)
    x = torch.randn(128, 64, requires_grad=True)
    for _ in range(3):
        with apply_options({"*": BlockOption.KEEP_OFFLOADED}, blocks, offloader):
            net(x)
    assert offloader.pool.size_bytes == 4 * 128 * 64 * 4


def test_small_tensors_and_weights_stay():
    net, blocks = make_blocks()
    offloader = Offloader(CPU)
    x = torch.randn(8, 64, requires_grad=True)
    run(net, blocks, x, BlockOption.KEEP_OFFLOADED, offloader)
    assert offloader.pool.size_bytes == 0


def test_a_packed_weight_stays():
    """It behaves like a dense tensor, so moving it would unpack it and take host memory without freeing any."""
    moved = []
    for kind in (None, "int8"):
        net, blocks = make_blocks()
        if kind is not None:
            assert len(quantize_linears(net, kind, CPU, torch.float32)) == 8
            assert isinstance(net[0][0], QuantizedLinear)
        offloader = Offloader(CPU, smallest_bytes=1)
        run(net, blocks, torch.randn(128, 64, requires_grad=True), BlockOption.KEEP_OFFLOADED, offloader)
        moved.append(offloader.pool.size_bytes)
    assert moved[0] == moved[1] > 0


def test_memory_order_survives():
    """A channels_last tensor comes back channels_last, a view with gaps comes back dense; the values are the same."""
    pool = HostPool(CPU)
    saved = {}

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            a = x.exp().contiguous(memory_format=torch.channels_last)
            ctx.save_for_backward(a, a[:, :, ::2])
            saved["before"] = (a, a[:, :, ::2])
            return a.sum()

        @staticmethod
        def backward(ctx, g):
            saved["after"] = ctx.saved_tensors
            return torch.zeros(2, 4, 6, 6)

    class Module(nn.Module):
        def forward(self, x):
            return Save.apply(x)

    module = Module()
    offloader = Offloader(CPU, pool, smallest_bytes=1)
    with apply_options({"m": BlockOption.KEEP_OFFLOADED}, [Block("m", module, "residuals")], offloader):
        y = module(torch.randn(2, 4, 6, 6, requires_grad=True))
    offloader.settle()
    y.backward()
    for before, after in zip(saved["before"], saved["after"], strict=True):
        assert torch.equal(before, after) and before.data_ptr() != after.data_ptr()
    assert saved["after"][0].is_contiguous(memory_format=torch.channels_last)
