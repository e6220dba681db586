"""Offloading on the emulated GPU: which copy waits for which; host memory locked, refused and given back."""

import contextlib
import logging
from itertools import cycle

import pytest
import torch
from torch import nn

from alignprop_fast import DifferentiableSampler
from alignprop_fast.ops.garbage import collect_garbage
from alignprop_fast.planner import BlockOption, Plan
from alignprop_fast.runtime import Block, HostPool, Offloader, apply_options, link_rate
from alignprop_fast.runtime.host_pool import IDLE_CHAINS

CUDA = torch.device("cuda")


@pytest.fixture
def net(emulated):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(4)))
    return net.requires_grad_(False).to("cuda")


@pytest.fixture
def unordered(emulated, monkeypatch):
    """Copies that do not wait for the last use of their host buffer; the list must stay empty.

    From here on streams count their copies.
    """
    found, last = [], {}
    copy = torch.Tensor.copy_

    def copying(to, source, *rest, **options):
        host = next((t for t in (to, source) if not t.is_cuda), None)
        if host is not None:
            stream, address = torch.cuda.current_stream(), host.data_ptr()
            if address in last and not stream.comes_after(last[address]):
                found.append((stream.number, last[address]))
            last[address] = stream.work()
        return copy(to, source, *rest, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", copying)
    return found


class Dies(torch.autograd.Function):
    """Ends the step in its forward or in its backward pass."""

    @staticmethod
    def forward(ctx, x, when):
        if when == "forward":
            raise RuntimeError("the step dies")
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("the step dies")


def forward(net, offloader):
    x = torch.randn(128, 64, requires_grad=True, device="cuda")
    with apply_options(
        {"*": BlockOption.KEEP_OFFLOADED}, [Block(str(k), m, "residuals") for k, m in enumerate(net)], offloader
    ):
        y = net(x)
    offloader.settle()
    return x, y


def step(net, offloader, dies):
    with pytest.raises(RuntimeError, match="the step dies") if dies else contextlib.nullcontext():
        forward(net, offloader)[1].sum().backward()
    collect_garbage()  # the traceback keeps the step alive, and so does the thread of autograd
    pool = offloader.pool
    assert sum(buffer.size_bytes for free in pool._free.values() for buffer in free) == pool.size_bytes


@pytest.mark.parametrize("dies", [None, "forward", "backward"])
def test_a_buffer_waits_for_the_last_copy_that_touches_it(net, unordered, dies):
    pool = HostPool(CUDA)
    if dies:
        net[1][2].register_forward_hook(lambda module, args, out: Dies.apply(out, dies))
    for _ in range(3):
        step(net, Offloader(CUDA, pool, smallest_bytes=1), dies)
    assert pool.size_bytes == (2 if dies == "forward" else 4) * 128 * 64 * 4, "the buffers were used again"
    assert unordered == []


@pytest.mark.parametrize("dies", ["forward", "backward"])
def test_device_memory_is_not_handed_out_under_a_copy(net, unordered, dies):
    """The next step may use the memory of a failed one, so its stream must have waited for the copies."""
    offloader = Offloader(CUDA, HostPool(CUDA), smallest_bytes=1)
    net[1][2].register_forward_hook(lambda module, args, out: Dies.apply(out, dies))
    step(net, offloader, dies)
    for stream in (offloader.out, offloader.back):
        assert torch.cuda.current_stream().comes_after((stream.number, stream.seen[stream.number]))


def test_what_nobody_uses_goes_back_to_the_system(net, emulated):
    pool = HostPool(CUDA)
    forward(net, Offloader(CUDA, pool, smallest_bytes=1))
    held = sum(emulated.registered.values())
    assert held == pool.size_bytes == 4 * 128 * 64 * 4
    for _ in range(IDLE_CHAINS - 1):
        pool.begin_chain()
    assert pool.size_bytes == held, "gates differ from step to step: the next plan may want it"
    pool.begin_chain()
    assert pool.size_bytes == 0 and not emulated.registered


def test_buffers_of_other_sizes_make_room_within_the_limit(emulated):
    pool = HostPool(CUDA, limit_bytes=3 * 2**20)
    for buffer in [pool.take(2**20) for _ in range(3)]:
        pool.give(buffer)
    del buffer
    pool.give(pool.take(2**21))
    assert pool.size_bytes == sum(emulated.registered.values()) == 3 * 2**20
    held = [pool.take(2**21), pool.take(2**21)]
    assert pool.size_bytes == 2**22, "what is in use stays, whatever the limit"
    del held


def test_a_driver_that_refuses_to_lock_ends_nothing(net, emulated, monkeypatch, caplog):
    monkeypatch.setattr(emulated, "lockable_bytes", 2 * 128 * 64 * 4)
    pool = HostPool(CUDA)
    with caplog.at_level(logging.WARNING):
        x, y = forward(net, Offloader(CUDA, pool, smallest_bytes=1))
    y.square().sum().backward()
    grad, x.grad = x.grad, None
    net(x).square().sum().backward()
    assert torch.equal(grad, x.grad)
    assert pool.limit_bytes == 2 * 128 * 64 * 4, "so much was locked, and a plan is to take no more"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "raise ulimit -l" in line and "\n" not in line


def test_no_link_where_nothing_is_locked(emulated, monkeypatch):
    assert link_rate(CUDA) > 0
    monkeypatch.setattr(emulated, "lockable_bytes", 0)
    assert link_rate(CUDA) is None
    torch.ones(2, device="cuda").sum()  # the driver's error must not appear as the next kernel's


SLOW = pytest.mark.slow("the same code as of the others")


@pytest.mark.parametrize(
    "adapted",
    [
        *("tiny_qwen_image", "tiny_krea2"),
        *(pytest.param(name, marks=SLOW) for name in ("tiny_chroma", "tiny_lumina2", "tiny_sana")),
    ],
    indirect=True,
)
def test_an_offloaded_run_of_texts_with_padding_gives_the_bits_of_a_resident_one(adapted, plain_kernels, monkeypatch):
    """Each block has another option that offloads."""
    sampler = DifferentiableSampler(adapted.to("cuda"), 2, memory_budget=None, height=16, width=16)
    pool = HostPool(CUDA)
    monkeypatch.setattr(sampler.renderer, "_offloader", lambda plan: Offloader(CUDA, pool, smallest_bytes=1))
    offloading = cycle(option for option in BlockOption if option.offload)
    mixed = {block.name: next(offloading) for block in sampler.denoiser_blocks}
    results = []
    for options in ({"*": BlockOption.KEEP}, mixed):
        plan = Plan(2, (0, 1), (), (options, options))
        images = sampler(["a red cat", "a dog" * 12], None, torch.Generator().manual_seed(3), plan=plan)
        (images * torch.linspace(0, 1, 16, device="cuda")).mean().backward()
        results.append([images.detach(), *(parameter.grad for parameter in sampler.model.trainable())])
        adapted.transformer.zero_grad()
        assert bool(pool.size_bytes) == (options is mixed)
    assert all(torch.equal(resident, moved) for resident, moved in zip(*results, strict=True))
    assert all(grad.any() for grad in results[0][1:])
