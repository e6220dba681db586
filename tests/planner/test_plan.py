"""Plans: costs computed by hand, explanations, options by name, remedies, and sizes as people write them."""

from dataclasses import replace

import pytest

from alignprop_fast.planner import (
    BlockOption,
    BudgetInfeasible,
    CostTable,
    Option,
    Plan,
    Segment,
    Stage,
    StageChoice,
    budget_from_free,
    budget_on,
    by_group,
    format_bytes,
    leanest,
    option_of,
    parse_budget,
    parse_bytes,
    price,
    ranges,
    solve,
    summary,
)
from alignprop_fast.planner.remedies import remedies


def simple_table():
    step = tuple(
        Segment(f"{kind}.{k}", (Option("keep", 100, 10, 1.0), Option("recompute", 10, 100, 1.5)))
        for kind in ("block", "resnet")
        for k in range(2)
    )
    decoder = Stage("batch", (Segment("decoder", (Option("keep", 300, 50, 1.0),)),))
    return CostTable({"weights": 1000, "optimizer": 10}, 1, 5, step, 60, 0.5, (decoder,), reserve_bytes=20)


def test_plans_made_by_hand_are_priced():
    plan = price(
        simple_table(),
        Plan(
            4,
            (3,),
            (1,),
            ({"*": BlockOption.RECOMPUTE, "block.0": BlockOption.KEEP},),
            {"*": BlockOption.RECOMPUTE},
            StageChoice("batch"),
        ),
    )
    # Resident: 100 + 3 * 10 kept. Peak: the decoder with its 300 kept and 50 transient, images and latents beside it.
    assert plan.peak_bytes == 1010 + 4 + 130 + 5 + 350
    assert plan.seconds == 3 * 0.5 + (1.0 + 3 * 1.5) + 4 * 1.5 + 1.0
    assert plan.phases["replayed steps"] == 1010 + 4 + 5 + 40 + 100
    assert plan.phases["sampling"] == 1010 + 4 + 60  # the resident step is the last: nothing is kept before
    with pytest.raises(ValueError, match="keep, recompute"):
        price(simple_table(), replace(plan, replay_options={"*": "magic"}))
    with pytest.raises(ValueError, match="batch"):
        price(simple_table(), replace(plan, decoder=StageChoice("tiles")))


def test_leanest_plans_are_priced_where_the_table_has_their_options():
    step = tuple(Segment(f"block.{k}", (Option("attention", 10, 5, 1.0), Option("keep", 50, 5, 0.5))) for k in range(3))
    image = Stage("image", (Segment("decoder", (Option("keep", 30, 5, 0.25),)),), 4, True, 20, 0.5)
    table = replace(simple_table(), step=step, decoders=(image,))
    plan = price(table, leanest(4, (1, 2)))
    assert plan.phases["replayed steps"] == 1010 + 4 + 5 + 35
    assert plan.seconds == 4 * 0.5 + 2 * 3.0 + 0.5 + 4 * 0.25
    assert solve(table, 4, (1, 2), plan.peak_bytes).seconds <= plan.seconds


def test_options_by_name():
    assert option_of({"a": BlockOption.KEEP, "*": BlockOption.ATTENTION}, "a") == BlockOption.KEEP
    assert option_of({"a": BlockOption.KEEP, "*": BlockOption.ATTENTION}, "b") == BlockOption.ATTENTION
    assert option_of({}, "b") == "keep"


def test_a_plan_has_options_for_each_resident_step():
    with pytest.raises(ValueError, match="each resident step"):
        Plan(4, (2, 3), (), ({"*": BlockOption.KEEP},))


def test_plans_explain_themselves():
    text = solve(simple_table(), 6, (2, 3, 5), 10_000).explain()
    assert "3 resident (2-3, 5)" in text and "predicted peak" in text and "peak by phase" in text
    assert "keep x 4 (block, resnet)" in text and "weights" in text and "transient" in text
    unmeasured = leanest(6, (2, 3)).explain()
    assert "leanest" in unmeasured and "attention everywhere" in unmeasured


def test_blocks_are_named_by_their_kind():
    options = {
        **{
            f"down_blocks.{i}.attentions.0.transformer_blocks.{k}": BlockOption.ATTENTION
            for i in range(3)
            for k in range(2)
        },
        **{f"up_blocks.{i}.resnets.0": BlockOption.KEEP for i in range(4)},
        "mid_block.attentions.0": BlockOption.KEEP,
        "rest": BlockOption.KEEP,
        "7": BlockOption.RECOMPUTE,
    }
    assert summary(options) == (
        "attention x 6 (transformer blocks), keep x 6 (residual blocks, attentions, the rest), recompute x 1 (7)"
    )
    assert summary({"*": BlockOption.KEEP}) == "keep everywhere" and summary({}) == "no segments"
    assert ranges((9, 3, 4, 5)) == "3-5, 9" and ranges(()) == ""


def test_kinds_of_memory_in_the_groups_that_people_think_in():
    groups = by_group(
        {"weights": 1, "reward": 2, "optimizer": 4, "gradients": 8, "latents": 16, "kept": 32, "mine": 64}
    )
    assert groups == {
        **{"weights": 3, "adapters and optimizer": 12, "kept": 48, "transient": 0, "workspace": 0},
        "other": 64,
    }


def test_budgets_are_held_to_the_device():
    gib = 2**30
    assert budget_on("card", 24 * gib, None) == (24 * gib - gib // 2, "")
    assert budget_on("card", 24 * gib, 20 * gib) == (20 * gib, "")
    # A budget with the size on the box is reduced, and a note says so.
    size, note = budget_on("card", 22 * gib, 24 * gib)
    assert size == 22 * gib - gib // 2 and "card has 22.00 GiB" in note and "reduced to 21.50 GiB" in note
    with pytest.raises(ValueError, match=r"more than card has \(22.00 GiB\): use at most 21.50 GiB"):
        budget_on("card", 22 * gib, 25 * gib)
    assert budget_on("computer", gib, None, context_bytes=0) == (gib, "")


def test_a_budget_on_a_gpu_that_is_here_is_what_is_free():
    gib = 2**30
    card = {"device": "card", "total_bytes": 100 * gib, "free_bytes": 60 * gib, "own_bytes": 30 * gib}
    size, note = budget_from_free(**card, wanted_bytes=None)
    assert size == int(0.97 * 90 * gib) and note.startswith("memory budget 87.30 GiB")
    assert "100.00 GiB on card" in note and "taken 10.00 GiB" in note and "3% of the rest stays free" in note
    size, note = budget_from_free(**card, wanted_bytes=90 * gib)
    assert size == int(0.97 * 90 * gib) and "90.00 GiB is reduced to 87.30 GiB" in note and "taken 10.00 GiB" in note
    assert budget_from_free(**card, wanted_bytes=87 * gib)[0] == 87 * gib
    # On a card that other programs have filled the budget is small but never negative.
    assert budget_from_free("card", 100 * gib, gib, gib, None)[0] == int(0.97 * 2 * gib)


def test_budgets_in_words():
    assert [parse_budget(text) for text in (None, "none", "auto", "2GiB", 7)] == [None, None, "auto", 2**31, 7]
    for text in ("Auto", "much", 0, ""):
        with pytest.raises(ValueError, match="24GiB"):
            parse_budget(text)
    with pytest.raises(ValueError, match="host memory 'much' is not a size"):
        parse_bytes("much", "host memory")
    assert parse_bytes("0", or_zero=True) == 0


def test_too_small_a_budget_names_the_least_and_the_remedies():
    with pytest.raises(BudgetInfeasible, match="quantised") as error:
        solve(simple_table(), 4, (0, 1), 1000)
    assert "8-bit" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BudgetInfeasible, match=r"8-bit optimizer.*tiled decode"):
        solve(replace(simple_table(), fixed={"weights": 10, "optimizer": 400}), 4, (0, 1), 100)
    with pytest.raises(BudgetInfeasible, match="chunked reward"):
        solve(replace(simple_table(), reserve_bytes=5000), 4, (0, 1), 100)


@pytest.mark.parametrize(("part", "name"), [("decoder", "bands"), ("reward", "chunk:1")])
def test_what_runs_in_pieces_already_is_no_remedy(part, name):
    pieces = StageChoice(name)
    plan = replace(leanest(4, (0, 1)), phases={part: 100}, kinds={"transient": 100}, peak_bytes=100, **{part: pieces})
    assert remedies(plan) == ["a smaller batch or resolution"]
    assert remedies(replace(plan, **{part: StageChoice("batch")})) != ["a smaller batch or resolution"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [("24GiB", 24 * 2**30), ("1.5 GiB", 3 * 2**29), ("512mib", 2**29), ("24GB", 24 * 10**9), (1000, 1000), ("77", 77)],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "many", "-3GiB", "0", "3 elephants", "1e9", -5])
def test_no_sizes(size):
    with pytest.raises(ValueError, match="24GiB"):
        parse_bytes(size)


def test_a_size_rounded_up_is_enough():
    for size in (123_456_789, 7 * 2**30 + 1, 2**20):
        assert parse_bytes(format_bytes(size, up=True)) >= size
