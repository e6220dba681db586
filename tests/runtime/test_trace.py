"""Costs by interval: exact for mixed options, equal from one block of a kind and from all, and estimates.

Bytes are counted, so predictions equal the count when the mixture runs. Tolerance: 0.1 %, for the few bytes that blocks
share.
"""

import random
from collections import Counter
from functools import reduce
from operator import add

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from alignprop_fast.models.lean.surgery import put_ops_in
from alignprop_fast.planner import GRADES, BlockOption, option_of
from alignprop_fast.runtime import (
    Block,
    LiveBytes,
    Offloader,
    Work,
    apply_options,
    remembered_results,
    segments,
    trace,
    transfer_bytes,
)

CPU = torch.device("cpu")


class Network(nn.Module):
    """Two kinds of transformer blocks with a product between them, as a denoiser has."""

    def __init__(self):
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList([BasicTransformerBlock(32, 2, 16, cross_attention_dim=24) for _ in range(3)])
        self.between = nn.Linear(32, 64)
        self.second = nn.ModuleList([BasicTransformerBlock(64, 2, 32, cross_attention_dim=24) for _ in range(3)])

    def forward(self, x, words):
        for block in self.first:
            x = block(x, encoder_hidden_states=words)
        x = self.between(x)
        for block in self.second:
            x = block(x, encoder_hidden_states=words)
        return x


def make_work(device=CPU, repeats=1):
    with torch.device(device):
        net = Network().requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), net)
        put_ops_in(net)
        x, words = torch.randn(2, 48, 32, requires_grad=True), torch.randn(2, 7, 24)
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    blocks = [Block(f"{n}.{k}", m, "transformers") for n in ("first", "second") for k, m in enumerate(getattr(net, n))]
    return Work(
        forward=lambda: net(x, words),
        pull=lambda y, leaves: torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True),
        leaves=wanted,
        blocks=blocks,
        device=torch.device(device),
        repeats=repeats,
    )


def predicted(found, options):
    """(kept, peak) of a mixture by the planner's arithmetic."""
    kept, peak = 0, 0
    for segment in found:
        option = segment.option(option_of(options, segment.name))
        kept += option.kept_bytes
        peak = max(peak, kept + option.transient_bytes)
    return kept, peak


def counted(work, options):
    offloader = Offloader(CPU)
    with LiveBytes() as live:
        with apply_options(options, work.blocks, offloader):
            y = work.forward()
        offloader.settle()
        kept = live.live_bytes
        work.pull(y, work.leaves)
    return kept, live.peak_bytes


@pytest.mark.slow("counts every operator of many mixtures")
def test_costs_of_mixtures_are_sums():
    work, rng = make_work(), random.Random(0)
    found = segments(work)
    assert [segment.name for segment in found] == [block.name for block in work.blocks] + ["rest"]
    mixtures = [{"*": option} for option in GRADES]
    mixtures += [{block.name: rng.choice([*GRADES]) for block in work.blocks} for _ in range(8)]
    for options in mixtures:
        options = {**options, "rest": BlockOption.KEEP}
        for ours, real in zip(predicted(found, options), counted(work, options), strict=True):
            assert ours == pytest.approx(real, rel=1e-3)


def test_one_block_of_each_kind_stands_for_all():
    """Of six blocks of two kinds: each runs once, and the first of each kind once more per option, and its offloaded
    form. An option in all blocks takes what the network takes under it."""
    work, calls = make_work("meta"), Counter()
    handles = [b.module.register_forward_hook(lambda *_, name=b.name: calls.update([name])) for b in work.blocks]
    with remembered_results():
        found = segments(work, offload=True)
        for handle in handles:
            handle.remove()
        wholes = {option: trace(work, {"*": option}) for option in GRADES}
    first = {"first.0", "second.0"}
    assert calls == {block.name: 1 + 2 * len(GRADES) * (block.name in first) for block in work.blocks}
    for option, whole in wholes.items():
        mixture = [segment.option(option if segment.name != "rest" else BlockOption.KEEP) for segment in found]
        assert sum(each.kept_bytes for each in mixture) == sum(each.kept_bytes for each in whole.intervals)
        assert reduce(add, (each.seconds for each in mixture)) == whole.seconds


def test_offloaded_options_say_what_stays():
    found = segments(make_work(), offload=True)
    there, plain = found[0].option("keep+offload"), found[0].option("keep")
    assert there.kept_bytes + there.host_bytes == plain.kept_bytes and there.host_bytes > 0
    assert there.seconds == plain.seconds


@pytest.mark.slow("counts every operator of many mixtures")
@pytest.mark.parametrize("seed", range(4))
def test_mixtures_with_offloading_never_take_more_than_predicted(seed):
    """And lower by at most one block's bytes in transfer, because a neighbour may have fewer."""
    work, rng = make_work(), random.Random(seed)
    found = segments(work, offload=True)
    for _ in range(5):
        options = {segment.name: rng.choice(segment.options).name for segment in found}
        kept, peak = predicted(found, options)
        real_kept, real_peak = counted(work, options)
        assert kept == real_kept
        assert real_peak <= peak + transfer_bytes(found) <= real_peak + 2 * transfer_bytes(found)


@pytest.mark.slow("counts every operator under each option")
def test_meta_tensors_count_the_same_bytes():
    real = segments(make_work(), offload=True)
    meta = segments(make_work("meta"), offload=True)
    assert transfer_bytes(real) > 0
    for one, two in zip(real, meta, strict=True):
        for option in one.options:
            other = two.option(option.name)
            assert (option.kept_bytes, option.transient_bytes) == (other.kept_bytes, other.transient_bytes)
            assert option.host_bytes == other.host_bytes
            assert other.seconds.times


def test_estimates_count_products_forward_and_back():
    """FLOP of the middle layer and of an attention, from their shapes; recomputation counts again."""
    work = make_work("meta")

    def times(options):
        """How often each number of FLOP is done by one operator."""
        counted = Counter()
        for operator, number in trace(work, options).seconds.times.items():
            counted[operator.flop] += number
        return counted

    kept, between = times({}), 2 * 2 * 48 * 32 * 64
    assert kept[between] >= 2
    attention = 2 * 2 * 2 * 48 * 48 * 16  # one product of one self-attention of the first kind
    assert kept[2 * attention] == 3 and kept[5 * attention] == 3
    assert times({"*": BlockOption.RECOMPUTE})[2 * attention] == 6


def test_times_are_those_of_the_parts(monkeypatch):
    """Time is charged to the block in which it passes. The clock stands still but there."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def let_pass(module, args):
        now[0] += 0.05

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    blocks = [Block(str(k), m, "residuals") for k, m in enumerate(net)]
    net[1].register_forward_pre_hook(let_pass)
    x = torch.randn(2, 4, requires_grad=True)
    work = Work(lambda: net(x), lambda y, leaves: torch.autograd.grad(y.sum(), leaves), blocks, CPU, [x])
    seconds = [interval.seconds for interval in trace(work, {}).intervals]
    assert seconds[1] == pytest.approx(0.05) and not any(seconds[:1] + seconds[2:])
