"""The solver against brute force through the training step, its monotonicity, and its host limit."""

import random
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from alignprop_fast.planner import (
    BudgetInfeasible,
    GraphCosts,
    GraphUse,
    Option,
    Plan,
    Segment,
    Solver,
    Stage,
    StageChoice,
    price,
    simulate,
    solve,
)
from alignprop_fast.planner.curves import Curves
from alignprop_fast.planner.frontier import best

from .brute_force import every_plan, random_segments, random_table, run, walked


def test_solver_equals_brute_force():
    """The best of all plans that keep the budget for any gates. A plan's prediction is the peak under its own gates."""
    rng = random.Random(0)
    for _ in range(2000):
        table = random_table(rng)
        num_steps = rng.randint(1, 5)
        many = sum(len(segment.options) for segment in table.step) > 6
        grad_steps = tuple(sorted(rng.sample(range(num_steps), rng.randint(0, min(num_steps, 2 if many else 3)))))
        plans = every_plan(table, num_steps, len(grad_steps))
        least, most = int(plans[:, 0].min()), int(plans[:, 0].max())
        solver = Solver(table, num_steps, len(grad_steps))
        with pytest.raises(BudgetInfeasible) as error:
            solver.plan(grad_steps, least - 1)
        assert error.value.smallest_bytes == least
        for budget in (least, rng.randint(least, most), rng.randint(least, most), most):
            fitting = plans[plans[:, 0] <= budget]
            seconds = fitting[:, 1].min()
            peak = fitting[fitting[:, 1] == seconds, 0].min()
            plan = solver.plan(grad_steps, budget)
            assert plan.exact and plan.seconds == seconds and plan.peak_bytes == walked(table, plan) <= peak
            if not plan.resident_steps or plan.resident_steps[-1] < num_steps - 1:
                assert plan.peak_bytes == peak
            assert plan.replayed_steps + plan.resident_steps == grad_steps


def test_graphs_are_weighed_against_what_else_their_memory_could_do():
    """Brute force again, where evaluations, or those and replays, may run as CUDA graphs."""
    rng, used = random.Random(5), set()
    for _ in range(150):
        ratios = rng.choice([0.5, 0.75, 1.0]), rng.choice([0.5, 0.75, 1.0])
        table = replace(random_table(rng), graphs=GraphCosts(*ratios, rng.randint(0, 9)))
        table = replace(table, closed_bytes=table.sampling_bytes, closed_seconds=rng.randint(0, 8) / 8)
        plans = np.concatenate([every_plan(table, 3, 2, use) for use in GraphUse])
        least, most = int(plans[:, 0].min()), int(plans[:, 0].max())
        solver = Solver(table, 3, 2)
        for budget in (least, *(rng.randint(least, most) for _ in range(3)), most):
            fitting = plans[plans[:, 0] <= budget]
            seconds = fitting[:, 1].min()
            plan = solver.plan((0, 2), budget)
            assert plan.seconds == seconds and plan.peak_bytes <= fitting[fitting[:, 1] == seconds, 0].min()
            pool_bytes = table.pool_bytes(plan.graphs, run_of(table, plan))
            assert {moment.kinds.get("graphs", 0) for moment in simulate(table, plan)} == {pool_bytes}
            used.add(plan.graphs)
    assert used == set(GraphUse)


def run_of(table, plan):
    """Bytes of one replay alone."""
    if not plan.replayed_steps:
        return 0
    return run([segment.option(plan.replay_options[segment.name]) for segment in table.step])[1]


def test_a_single_gradient_step_has_no_sums_beside_it():
    """The least budget that the solver names for one gradient step has a plan, also if it was made for several."""
    rng, fewer = random.Random(3), 0
    for _ in range(200):
        table = replace(random_table(rng), sums_bytes=40)
        solver = Solver(table, 4, 4)
        least = int(every_plan(table, 4, 1)[:, 0].min())
        with pytest.raises(BudgetInfeasible) as error:
            solver.plan((3,), least - 1)
        assert error.value.smallest_bytes == least == solver.plan((3,), least).peak_bytes
        fewer += least < every_plan(table, 4, 2)[:, 0].min() - table.latent_bytes
    assert fewer > 100


def test_repeated_frontiers_come_close_to_brute_force(monkeypatch):
    """The method for large tables, on small ones: never over budget, never far from the fastest plan."""
    monkeypatch.setattr("alignprop_fast.planner.curves.EXACT_SEGMENTS", 0)
    rng = random.Random(1)
    ratios = []
    for _ in range(200):
        table, grad_steps = random_table(rng), (1, 2)
        plans = every_plan(table, 4, 2)
        least, most = int(plans[:, 0].min()), int(plans[:, 0].max())
        solver = Solver(table, 4, 2)
        with pytest.raises(BudgetInfeasible) as error:
            solver.plan(grad_steps, least - 1)
        assert error.value.smallest_bytes == least
        assert solver.fits(2, least) and solver.may_fit(2, least) and not solver.fits(2, least - 1)
        before = np.inf
        for budget in np.linspace(least, most, 9).astype(int):
            plan = solver.plan(grad_steps, int(budget))
            best = plans[plans[:, 0] <= budget, 1].min()
            assert plan.peak_bytes <= budget and not plan.exact and best <= plan.seconds <= before
            ratios.append(plan.seconds / best)
            before = plan.seconds
    assert np.mean(ratios) < 1.02 and np.mean(np.array(ratios) == 1) > 0.8


def test_of_equal_labels_the_first_is_taken():
    """On every computer; NumPy's default sort puts them in an order of its own, which depends on the processor."""
    need = np.array([3, 7, 7] * 400)
    assert best(need, -need.astype(float), 10)[0].tolist() == [0, 1]


def test_more_budget_never_gives_a_slower_plan():
    for seed in range(20):
        solver, seconds = Solver(random_table(random.Random(seed)), 6, 3), []
        for budget in range(30, 600, 7):
            try:
                seconds.append(solver.plan((1, 3, 5), budget).seconds)
            except BudgetInfeasible:
                assert not seconds
        assert seconds == sorted(seconds, reverse=True) and len(seconds) > 1


def offloading(table, limit):
    """The table with one more option in every segment of a step, which keeps its bytes in host memory."""
    step = tuple(
        replace(segment, options=(*segment.options, Option("offload", 1, 5, segment.options[0].seconds, 40)))
        for segment in table.step
    )
    return replace(table, step=step, host_limit_bytes=limit)


def test_bounds_leave_out_no_faster_plan(monkeypatch):
    """The method for large tables finds the same plan if it tries every number of resident steps."""
    monkeypatch.setattr("alignprop_fast.planner.curves.EXACT_SEGMENTS", 0)

    def plans():
        for seed, limit in product(range(3), (None, 40, 120)):
            solver = Solver(offloading(random_table(random.Random(seed)), limit), 6, 6)
            for budget, grad_steps in product(range(150, 700, 130), (range(6), range(3, 6))):
                try:
                    yield solver.plan(grad_steps, budget)
                except BudgetInfeasible as error:
                    yield error.smallest_bytes

    bounded = list(plans())
    monkeypatch.setattr(Curves, "_least_seconds", lambda self, room: np.zeros(self.most_grad_steps + 1))
    assert bounded == list(plans())


def test_host_memory_is_kept_to_its_limit():
    over, slower_alone = 0, 0
    for seed in range(40):
        table = random_table(random.Random(seed))
        limit = 40 * len(table.step)
        free, limited, plain = (Solver(t, 5, 3) for t in (offloading(table, None), offloading(table, limit), table))
        before = np.inf
        with pytest.raises(BudgetInfeasible) as error:
            plain.plan((0, 2, 4), 1)
        for budget in range(error.value.smallest_bytes, 700, 40):
            plans = [solver.plan((0, 2, 4), budget) for solver in (free, limited, plain)]
            assert plans[1].host_bytes <= limit and plans[1].seconds <= before
            assert plans[0].seconds <= plans[1].seconds <= plans[2].seconds
            before = plans[1].seconds
            over += plans[0].host_bytes > limit
            slower_alone += plans[1].seconds < plans[2].seconds
    assert over > 20 and slower_alone > 20


def every_priced_plan(table):
    """Every plan of three steps whose first two carry gradient, with the table's one decoder and no reward."""
    names = [segment.name for segment in table.step]
    ways = [dict(zip(names, options, strict=True)) for options in product(*map(names_of, table.step))]
    decoder = StageChoice("batch", {segment.name: names_of(segment)[0] for segment in table.decoders[0].segments})
    for resident in range(3):
        for options in product(ways, repeat=resident):
            for replay in ways if resident < 2 else [{}]:
                steps = (0, 1)[2 - resident :], (0, 1)[: 2 - resident]
                yield price(table, Plan(3, *steps, options, replay, decoder))


def names_of(segment):
    return [option.name for option in segment.options]


def test_under_a_host_limit_plans_come_close_to_brute_force():
    """The solver searches by a few prices of host memory, so it may miss the fastest plan. It never goes over the
    limit, nor below the fastest."""
    rng, equal, found = random.Random(6), 0, 0
    for _ in range(40):
        decoder = Segment("decoder", (Option("keep", 5, 10, 1.0),))
        table = replace(random_table(rng), step=random_segments(rng, "step", 1), rewards=(), sums_bytes=0)
        table = replace(offloading(table, rng.choice([0, 40, 80])), decoders=(Stage("batch", (decoder,)),))
        plans = [plan for plan in every_priced_plan(table) if plan.host_bytes <= table.host_limit_bytes]
        solver = Solver(table, 3, 2)
        least, most = min(plan.peak_bytes for plan in plans), max(plan.peak_bytes for plan in plans)
        for budget in (*range(least, most, 15), most):
            fastest = min(plan.seconds for plan in plans if plan.peak_bytes <= budget)
            try:
                plan = solver.plan((0, 1), budget)
            except BudgetInfeasible:
                found += 1
                continue
            assert plan.host_bytes <= table.host_limit_bytes and plan.seconds >= fastest
            equal, found = equal + (plan.seconds == fastest), found + 1
    assert found > 200 and equal / found > 0.98


def test_offloading_makes_room_for_what_is_on_its_way():
    """Plans that offload add one block's transfer to every worst moment of a step; other plans do not."""
    rng, offloads, does_not = random.Random(4), 0, 0
    for _ in range(300):
        plain = random_table(rng)
        table = replace(offloading(plain, None), transfer_bytes=rng.randint(1, 60))
        # The same peaks without transfer_bytes: as if these bytes were images that exist only during the steps.
        step = tuple(
            replace(
                s,
                options=tuple(replace(o, transient_bytes=o.transient_bytes + table.transfer_bytes) for o in s.options),
            )
            for s in table.step
        )
        plans = np.concatenate([every_plan(plain, 3, 2), every_plan(replace(table, step=step), 3, 2)])
        least, most = int(plans[:, 0].min()), int(plans[:, 0].max())
        solver = Solver(table, 3, 2)
        with pytest.raises(BudgetInfeasible) as error:
            solver.plan((0, 2), least - 1)
        assert error.value.smallest_bytes == least
        for budget in (least, rng.randint(least, most), most):
            plan = solver.plan((0, 2), budget)
            assert plan.seconds == plans[plans[:, 0] <= budget, 1].min() and plan.peak_bytes <= budget
            offloads, does_not = offloads + (plan.host_bytes > 0), does_not + (plan.host_bytes == 0)
    assert offloads > 100 and does_not > 100


def test_a_host_limit_that_leaves_no_plan():
    table = random_table(random.Random(0))
    only = replace(table, step=(Segment("step.0", (Option("offload", 1, 1, 1.0, 100),)),), host_limit_bytes=50)
    with pytest.raises(ValueError, match="host limit"):
        solve(only, 2, (0, 1), 10**6)


def test_moments_are_what_the_plan_predicts():
    for seed in range(50):
        table = random_table(random.Random(seed))
        plan = solve(table, 5, (0, 2, 3), 600)
        moments = simulate(table, plan)
        assert max(moment.bytes for moment in moments) == plan.peak_bytes == sum(plan.kinds.values())
        assert max(plan.phases.values()) == plan.peak_bytes
        for before, after in pairwise(moments):
            assert after.start_seconds == pytest.approx(before.start_seconds + before.seconds)
        end = moments[-1].start_seconds + moments[-1].seconds
        assert end + table.optimizer_seconds == pytest.approx(plan.seconds)
        assert moments[-1].resting_bytes == table.base_bytes(3) + table.image_bytes + table.sums_bytes
        assert len(moments) == 5 + 4 + 3


@pytest.mark.parametrize("grad_steps", [(1, 0), (0, 0), (4,), (-1,)])
def test_bad_gradient_steps(grad_steps):
    with pytest.raises(ValueError, match="ascending"):
        solve(random_table(random.Random(0)), 4, grad_steps, 10**6)
