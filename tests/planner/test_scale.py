"""Cost tables at other batch sizes, the largest batch, and tables as files."""

import json
from dataclasses import replace

import pytest

from alignprop_fast.planner import (
    BlockOption,
    BudgetInfeasible,
    CostTable,
    GraphCosts,
    Option,
    Segment,
    Stage,
    largest_batch,
    load_table,
    save_table,
    scaled,
    solve,
)


def table_of_batch(batch):
    """Costs of a constant plus a share per image."""

    def options(size):
        return (
            Option(BlockOption.KEEP, 10 + size * batch, 5 * batch, 0.5 + 0.25 * batch),
            Option(BlockOption.RECOMPUTE, 3 + 2 * batch, size * batch, 0.75 + 0.5 * batch),
            Option(BlockOption.RECOMPUTE_OFFLOADED, 1, 7 * batch, 0.5 + 0.375 * batch, host_bytes=size * batch),
        )

    step = tuple(Segment(f"block.{k}", options(20 + k)) for k in range(3))
    image = Stage("image", (Segment("decoder", options(50)[:1]),), batch, True, 30, 0.125 * batch)
    reward = Stage("batch", (Segment("reward", options(30)[:2]),))
    return CostTable(
        fixed={"weights": 500, "workspace": 10 * batch},
        latent_bytes=2 * batch,
        image_bytes=4 * batch,
        step=step,
        sampling_bytes=40 * batch,
        sampling_seconds=0.5 * batch,
        decoders=(Stage("batch", (Segment("decoder", options(60)),)), image),
        rewards=(reward,),
        optimizer_seconds=0.25,
        host_limit_bytes=10_000,
        graphs=GraphCosts(0.5, 0.75, 6 * batch),
        origin={"model": "toy", "batch_size": str(batch)},
    )


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_a_scaled_table_is_the_table_at_that_batch_size(batch):
    assert scaled(table_of_batch(2), table_of_batch(4), 2, 4, batch) == table_of_batch(batch)


def test_bytes_are_rounded_up_and_never_negative():
    first, second = (replace(table_of_batch(1), sampling_bytes=size, reserve_bytes=9 - size) for size in (4, 5))
    between = scaled(first, second, 2, 4, 3)
    assert between.sampling_bytes == 5 and between.reserve_bytes == 5
    assert scaled(first, second, 2, 4, 100).reserve_bytes == 0


def test_a_share_of_graphs_stays_between_what_was_measured_and_one():
    first, second = (replace(table_of_batch(1), graphs=GraphCosts(ratio, ratio, 0)) for ratio in (0.5, 0.75))
    found = [scaled(first, second, 2, 4, batch).graphs.replay_ratio for batch in (1, 3, 5, 50)]
    assert found == [0.5, 0.625, 0.875, 1.0]
    assert scaled(first, replace(second, graphs=None), 2, 4, 3).graphs is None


def test_tables_of_different_models_have_none_between_them():
    table = table_of_batch(1)
    for other in (
        replace(table, step=table.step[:2]),
        replace(table, fixed={"weights": 1}),
        replace(table, rewards=()),
        replace(table, decoders=(replace(table.decoders[0], name="other"),)),
    ):
        with pytest.raises(ValueError, match="same model"):
            scaled(table, other, 1, 2, 3)
    with pytest.raises(ValueError, match="another size"):
        scaled(table, table, 1, 1, 3)


def test_what_fits_at_one_batch_size_alone_is_left_out():
    """The decoder with the whole batch, and an option of a step, are measured at batch size 1 and too large at 4."""
    small, large = table_of_batch(1), table_of_batch(4)
    step = tuple(replace(segment, options=segment.options[1:]) for segment in large.step)
    large = replace(large, decoders=large.decoders[1:], step=step)
    table = scaled(small, large, 1, 4, 2)
    assert [stage.name for stage in table.decoders] == ["image"]
    assert {option.name for segment in table.step for option in segment.options} == {"recompute", "recompute+offload"}
    expected = table_of_batch(2)
    assert table.decoders[0] == expected.decoders[1] and table.step[0].options == expected.step[0].options[1:]
    for one in (table, large):  # the planner works without them
        plan = solve(one, 6, (3, 4, 5), 10**6)
        assert plan.decoder.name == "image" and plan.peak_bytes > 0 and "image" in plan.explain()


@pytest.mark.parametrize(("budget", "host_bytes"), [(1200, None), (3000, None), (3000, 400), (10_000, 2000)])
def test_the_largest_batch_fits_and_the_next_does_not(budget, host_bytes):
    """Without limit of host memory 41 and 158 images fit in the last two."""

    def table(batch):
        return replace(table_of_batch(batch), host_limit_bytes=host_bytes)

    batch = largest_batch(table, 6, 3, budget)
    assert solve(table(batch), 6, (3, 4, 5), budget).peak_bytes <= budget
    with pytest.raises(BudgetInfeasible):
        solve(table(batch + 1), 6, (3, 4, 5), budget)


def test_the_largest_batch_has_bounds():
    assert largest_batch(table_of_batch, 6, 1, 10**9) == 1024
    assert largest_batch(table_of_batch, 6, 1, 500) == 0


def test_tables_survive_a_file(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("an older one")
    save_table(table_of_batch(3), path)
    assert load_table(path) == table_of_batch(3) and list(tmp_path.iterdir()) == [path]


def test_tables_of_the_first_format_are_read(tmp_path):
    path = tmp_path / "table.json"
    save_table(table_of_batch(3), path)
    text = (
        path.read_text()
        .replace('"transient_bytes"', '"spike_bytes"')
        .replace('"format_version": 2', '"format_version": 1')
    )
    assert '"spike_bytes"' in text and '"format_version": 1' in text
    path.write_text(text)
    assert load_table(path) == table_of_batch(3)


def damaged(change):
    def write(path):
        save_table(table_of_batch(1), path)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot read"),
        (lambda path: path.write_text('{"format_version": 1, "tab'), "damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "damaged"),
        (lambda path: path.write_text("[]"), "no format version"),
        (damaged(lambda content: content.update(format_version=3)), "format version 3, but this program reads 1 and 2"),
        (damaged(lambda content: content.pop("table")), "missing or unknown"),
        (damaged(lambda content: content["table"].pop("step")), "missing or unknown"),
        (damaged(lambda content: content["table"].update(spare=1)), "missing or unknown"),
        (damaged(lambda content: content["table"].update(latent_bytes=-1)), "never negative"),
        (damaged(lambda content: content["table"].update(latent_bytes="2")), "whole"),
        (damaged(lambda content: content["table"].update(decoders=[])), "no decoder"),
        (damaged(lambda content: content["table"]["step"][0].update(options=[])), "no option"),
        (damaged(lambda content: content["table"]["step"][1].update(name="block.0")), "twice"),
    ],
)
def test_files_that_are_no_table(tmp_path, write, message):
    path = tmp_path / "table.json"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        load_table(path)
    assert "\n" not in str(error.value) and "measure or estimate the table again" in str(error.value)
