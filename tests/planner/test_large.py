"""Tables of real size: plans are near a lower bound, monotone and within the budget, and take under a second."""

import random
import time
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from alignprop_fast.planner import BudgetInfeasible, CostTable, Option, Segment, Solver, Stage, solve

MIB = 2**20
NUM_STEPS = 50
# Name, kept and transient as shares of what "keep" keeps, seconds as a multiple of those of "keep".
GRADES = (
    ("keep", 1.0, 0.1, 1.0),
    ("norms", 0.9, 0.15, 1.01),
    ("half", 0.6, 0.4, 1.2),
    ("geglu", 0.5, 0.5, 1.06),
    ("qkv", 0.35, 0.65, 1.12),
    ("attention", 0.2, 0.8, 1.25),
    ("recompute", 0.06, 1.0, 1.4),
    ("offload", 0.06, 0.3, 1.3),
)


@cache
def large_table(noise):
    """100 segments with 8 options each; noise is the relative spread of every number, as in measured tables."""
    rng = random.Random(0)

    def near(value):
        return value * rng.uniform(1 - noise, 1 + noise)

    def segment(name, size, seconds):
        grades = [
            Option(grade, int(near(size * kept)), int(near(size * transient)), near(seconds * more))
            for grade, kept, transient, more in GRADES
        ]
        return Segment(name, tuple(grades))

    step = tuple(
        segment(f"block.{k}", rng.choice([30, 60, 120, 200]) * MIB, rng.choice([3e-3, 6e-3, 12e-3])) for k in range(100)
    )
    decoders = (
        Stage("batch", (segment("decoder", 12_000 * MIB, 1.0),)),
        Stage("image", (segment("decoder", 3_000 * MIB, 0.25),), 4, True, 900 * MIB, 0.3),
    )
    rewards = (Stage("batch", (segment("reward", 2_000 * MIB, 0.2),)),)
    return CostTable({"weights": 5_000 * MIB}, MIB, 48 * MIB, step, 700 * MIB, 0.2, decoders, rewards)


def tails(table):
    """(need, seconds) of each way to decode and score, beside the steps' kept bytes; both have one segment."""
    for stage in table.decoders:
        for option in stage.segments[0].options:
            for reward in table.rewards[0].segments[0].options:
                own, after = option.kept_bytes + option.transient_bytes, reward.kept_bytes + reward.transient_bytes
                if stage.replayed:
                    need, seconds = max(own, after), stage.forward_seconds + stage.runs * option.seconds
                else:
                    need, seconds = max(own, option.kept_bytes + after), option.seconds
                yield table.image_bytes + need, seconds + reward.seconds


def fastest_replay(table, room, slots=8192):
    """No replay within the room is faster: kept bytes rounded down to slots, segment after segment."""
    width = max(room / slots, 1.0)
    best = np.zeros(slots + 1)
    before = np.arange(slots + 1) * width
    for segment in reversed(table.step):
        ways = []
        for option in segment.options:
            shift = min(int(option.kept_bytes / width), slots)
            after = np.concatenate((best[shift:], np.full(shift, np.inf)))
            own = before + option.kept_bytes + option.transient_bytes
            ways.append(np.where(own <= room, option.seconds + after, np.inf))
        best = np.min(ways, axis=0)
    return best[0]


def lower_bound(table, grad_steps, budget):
    """No plan within the budget is faster (Lagrangian bound: a price for each kept byte, transient ones left out)."""
    room = budget - table.base_bytes(grad_steps)
    kept = np.array([[option.kept_bytes for option in segment.options] for segment in table.step])
    seconds = np.array([[option.seconds for option in segment.options] for segment in table.step])
    prices = np.concatenate(([0.0], np.geomspace(1e-14, 1e-8, 300)))
    step = np.array([np.min(seconds + price * kept, axis=1).sum() for price in prices])
    replay = fastest_replay(table, room - table.image_bytes)
    bounds = []
    for resident in range(grad_steps + 1):
        rest = (NUM_STEPS - resident) * table.sampling_seconds
        if resident < grad_steps:
            rest += (grad_steps - resident) * replay
        for need, tail_seconds in tails(table):
            left = room - max(need, table.sampling_bytes)
            if left >= 0:
                bounds.append(np.max(resident * step - prices * left) + tail_seconds + rest)
    return min(bounds)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("grad_steps", [5, 25])
def test_large_tables_are_solved_to_within_half_a_percent(noise, grad_steps):
    table, steps = large_table(noise), range(NUM_STEPS - grad_steps, NUM_STEPS)
    solver = Solver(table, NUM_STEPS, grad_steps)
    with pytest.raises(BudgetInfeasible) as error:
        solver.plan(steps, MIB)
    gaps = []
    for budget in np.geomspace(error.value.smallest_bytes, 10 * error.value.smallest_bytes, 12).astype(int):
        plan = solver.plan(steps, int(budget))
        assert plan.peak_bytes <= budget
        bound = lower_bound(table, grad_steps, int(budget))
        assert bound <= plan.seconds * (1 + 1e-12)
        gaps.append(plan.seconds / bound - 1)
    assert max(gaps) < 0.005


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_more_budget_never_gives_a_slower_plan(noise):
    solver = Solver(large_table(noise), NUM_STEPS, 30)
    plans = [solver.plan(range(20, 50), gib * 2**30 // 4) for gib in range(40, 900, 9)]
    for less, more in pairwise(plans):
        assert more.seconds <= less.seconds * (1 + 1e-12)
    assert len({len(plan.resident_steps) for plan in plans}) > 15
    assert all(plan.peak_bytes <= plan.budget_bytes for plan in plans)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_under_a_second(noise):
    table = large_table(noise)
    start = time.process_time()
    solve(table, NUM_STEPS, range(NUM_STEPS), 24 * 2**30)
    assert time.process_time() - start < 1.0


def test_the_least_budget_is_enough_and_one_byte_less_is_not():
    table = large_table(0.2)
    solver = Solver(table, NUM_STEPS, 25)
    with pytest.raises(BudgetInfeasible) as error:
        solver.plan(range(25), MIB)
    least = error.value.smallest_bytes
    assert solver.plan(range(25), least).peak_bytes == least
    with pytest.raises(BudgetInfeasible):
        solver.plan(range(25), least - 1)
