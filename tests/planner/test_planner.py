"""The solver against brute force written out, its monotony, and sizes as people write them."""

import random
from itertools import product

import pytest

from alignprop_fast.planner import (
    BudgetInfeasible,
    CostTable,
    Option,
    Segment,
    format_bytes,
    leanest,
    parse_bytes,
    solve,
)


def random_table(rng):
    def option(name):
        return Option(name, rng.randint(0, 50), rng.randint(0, 30), rng.random())

    def segments(prefix, count):
        return tuple(Segment(f"{prefix}{k}", (option("keep"), option("recompute"))) for k in range(count))

    return CostTable(
        rng.randint(0, 40), rng.randint(1, 3), segments("s", 2), segments("d", 1), rng.randint(0, 20), rng.random(), 5
    )


def brute_force(table, num_steps, grad_steps, budget):
    """(seconds, peak) of the fastest plan, walking through the phases one moment after another."""
    best = None
    step_choices = list(product(*(s.options for s in table.step)))
    for resident in range(len(grad_steps) + 1):
        for keep, replay, decode in product(
            step_choices, step_choices, list(product(*(s.options for s in table.decoder)))
        ):
            kept = [sum(o.kept_bytes for o in keep)] * resident
            base = table.fixed_bytes + table.latent_bytes * (2 + len(grad_steps))
            moments = [base + sum(kept[:-1]) + table.sampling_bytes]
            decoder_kept = sum(o.kept_bytes for o in decode)
            moments.append(base + sum(kept) + decoder_kept + max(o.transient_bytes for o in decode))
            moments.append(base + sum(kept) + decoder_kept + table.reward_bytes)
            while kept:
                moments.append(base + sum(kept) + max(o.transient_bytes for o in keep))
                kept.pop()
            if resident < len(grad_steps):
                moments.append(base + sum(o.kept_bytes for o in replay) + max(o.transient_bytes for o in replay))
            seconds = table.sampling_seconds * (num_steps - resident) + sum(o.seconds for o in decode)
            seconds += resident * sum(o.seconds for o in keep)
            seconds += (len(grad_steps) - resident) * sum(o.seconds for o in replay)
            if max(moments) <= budget and (best is None or (seconds, max(moments)) < best):
                best = (seconds, max(moments))
    return best


def test_solver_equals_brute_force():
    rng = random.Random(0)
    feasible = 0
    for _ in range(300):
        table, grad_steps, budget = random_table(rng), tuple(sorted(rng.sample(range(5), 3))), rng.randint(20, 500)
        expected = brute_force(table, 5, grad_steps, budget)
        if expected is None:
            with pytest.raises(BudgetInfeasible) as error:
                solve(table, 5, grad_steps, budget)
            smallest = error.value.smallest_bytes
            assert smallest > budget and brute_force(table, 5, grad_steps, smallest) is not None
            assert brute_force(table, 5, grad_steps, smallest - 1) is None
            continue
        feasible += 1
        plan = solve(table, 5, grad_steps, budget)
        assert (plan.seconds, plan.peak_bytes) == pytest.approx(expected)
        assert tuple(sorted(plan.resident_steps + plan.replayed_steps)) == grad_steps
        assert not plan.resident_steps or not plan.replayed_steps or plan.replayed_steps[-1] < plan.resident_steps[0]
    assert 50 < feasible < 295


def test_more_budget_never_gives_a_slower_plan():
    table = random_table(random.Random(3))
    seconds = []
    for budget in range(60, 400, 5):
        try:
            seconds.append(solve(table, 6, (1, 3, 4, 5), budget).seconds)
        except BudgetInfeasible:
            assert not seconds
    assert len(set(seconds)) > 2 and seconds == sorted(seconds, reverse=True)


def test_plans_explain_themselves():
    plan = solve(random_table(random.Random(1)), 6, (2, 3, 5), 10_000)
    text = plan.explain()
    assert "3 resident" in text and "predicted peak" in text and "reward" in text
    assert "leanest" in leanest(6, (2, 3)).explain()


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
