"""Counts on a GPU: by hand for one operator, and the same before and after they lie in a file."""

from dataclasses import replace

import pytest

from alignprop_fast.planner import (
    BlockOption,
    CostTable,
    CountedGraphs,
    CountedReward,
    CountedTable,
    Operator,
    Operators,
    Option,
    Segment,
    Stage,
    find_gpu,
    packed,
    unpacked,
)
from alignprop_fast.planner.gpus import BANDWIDTH_FRACTION, GRAPH_LAUNCH_SECONDS, LAUNCH_SECONDS, MATMUL_FRACTION

GPU = find_gpu("RTX 4090")
LAUNCH = Operator(0.0, 4, "float32")  # so small that its launch decides
COPY = Operator(0.0, 10**9, "float32")
PRODUCT = Operator(1e12, 10**6, "bfloat16")
COPY_SECONDS = 1e9 / (GPU.bandwidth * BANDWIDTH_FRACTION)
PRODUCT_SECONDS = 1e12 / (GPU.bf16_flops * MATMUL_FRACTION)


@pytest.fixture
def counted():
    block = Segment(
        "block.0",
        (
            Option(BlockOption.KEEP, 2_000_000_000, 10, Operators([PRODUCT])),
            Option(BlockOption.RECOMPUTE, 10, 10, Operators([PRODUCT, COPY])),
            Option(BlockOption.KEEP.offloaded, 0, 10, Operators([PRODUCT]), 2_000_000_000),
        ),
    )
    decoder = Stage("image", (Segment("rest", (Option(BlockOption.KEEP, 5, 5, Operators([COPY])),)),), 2, True, 7)
    costs = CostTable(
        fixed={"weights": 100, "reward": 0},
        latent_bytes=8,
        image_bytes=16,
        step=(block, Segment("rest", (Option(BlockOption.KEEP, 0, 0, Operators([LAUNCH])),))),
        sampling_bytes=20,
        sampling_seconds=Operators([LAUNCH, COPY]),
        decoders=(replace(decoder, forward_seconds=Operators([COPY]) * 2),),
        origin={"model": "of this test"},
    )
    return CountedTable(costs, CountedGraphs(static_bytes=3, replays=True))


def test_seconds_are_those_of_the_data_sheet(counted):
    table = counted.on(GPU)
    keep, again, offload = (option.seconds for option in table.step[0].options)
    assert keep == pytest.approx(PRODUCT_SECONDS) and again == pytest.approx(PRODUCT_SECONDS + COPY_SECONDS)
    copy = 2e9 / GPU.link
    hidden = min(copy, PRODUCT_SECONDS / 3) + min(copy, PRODUCT_SECONDS * 2 / 3)
    assert offload == pytest.approx(PRODUCT_SECONDS + 2 * copy - hidden)
    assert table.sampling_seconds == pytest.approx(LAUNCH_SECONDS + COPY_SECONDS)
    assert table.decoders[0].forward_seconds == pytest.approx(2 * COPY_SECONDS)
    assert table.origin == {"model": "of this test", "device": "RTX 4090"}
    assert counted.on(find_gpu("H100")).sampling_seconds < table.sampling_seconds


def test_graphs_save_launches(counted):
    table, saved = counted.on(GPU), LAUNCH_SECONDS - GRAPH_LAUNCH_SECONDS
    assert table.graphs.sampling_ratio == pytest.approx(1 - saved / (LAUNCH_SECONDS + COPY_SECONDS))
    # The leanest replay recomputes: nothing of it is on the host.
    replay = PRODUCT_SECONDS + COPY_SECONDS + LAUNCH_SECONDS
    assert table.graphs.replay_ratio == pytest.approx(1 - saved / replay)
    alone = replace(counted, graphs=CountedGraphs(3, replays=False, most_ratio=0.5)).on(GPU)
    assert (alone.graphs.sampling_ratio, alone.graphs.replay_ratio, alone.graphs.static_bytes) == (0.5, 0.5, 3)
    assert replace(counted, graphs=None).on(GPU).graphs is None


def test_a_reward_takes_its_place(counted):
    stage = Stage("batch", (Segment("rest", (Option(BlockOption.KEEP, 5, 5, Operators([PRODUCT])),)),))
    table = counted.scored_by(CountedReward((stage,), 50)).on(GPU)
    assert table.fixed == {"weights": 100, "reward": 50}
    assert table.rewards[0].segments[0].options[0].seconds == pytest.approx(PRODUCT_SECONDS)


def test_a_file_gives_the_same_counts(counted):
    reward = CountedReward(counted.costs.decoders, 50)
    for one in (counted, replace(counted, graphs=None), reward):
        assert unpacked(packed(one)) == one and packed(unpacked(packed(one))) == packed(one)
    for damaged in (b"", packed(counted)[:100], b"{}", packed(counted)[:-20]):
        with pytest.raises(ValueError, match="damaged counts"):
            unpacked(damaged)
