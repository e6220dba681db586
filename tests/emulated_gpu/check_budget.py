"""The memory budget on the emulated GPU: the free memory after everything has run; without gradient, no measuring."""

import logging

import pytest
import torch
from emulate import TOTAL_BYTES
from peft import LoraConfig

from alignprop_fast import DifferentiableSampler
from alignprop_fast.generate import cost_table
from alignprop_fast.planner.budget import HEADROOM

pytestmark = pytest.mark.usefixtures("plain_kernels")

GIB, STEPS, PROMPTS = 2**30, 3, ["a cat", "a dog"]
SHARE = 1 - HEADROOM


@pytest.fixture
def pipe(tiny_sd, emulated):
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    yield tiny_sd.to("cuda")
    emulated.set_limit(TOTAL_BYTES)


@pytest.fixture
def no_measuring(monkeypatch):
    for name in ("step_costs", "link_rate"):
        monkeypatch.setattr(cost_table, name, lambda *_: pytest.fail("costs were measured"))


def train(sampler):
    sampler(PROMPTS, None, torch.Generator().manual_seed(0)).mean().backward()
    return sampler


def test_auto_is_what_others_leave_free(pipe, emulated):
    emulated.set_limit(14 * GIB)  # a desktop and CUDA take the other 10
    sampler = train(DifferentiableSampler(pipe, STEPS))
    assert sampler.plan.budget_bytes == sampler.budget_bytes == int(SHARE * 14 * GIB)
    assert sampler.plan.resident_steps == (0, 1, 2), "who names nothing gets the fast way"
    assert "10.00 GiB" in sampler.budget_note and "3%" in sampler.budget_note and "\n" not in sampler.budget_note


@pytest.mark.parametrize("wish", ["24GiB", "13.9GiB", "2GiB"])
def test_a_wish_is_held_to_what_is_free(pipe, emulated, caplog, wish):
    emulated.set_limit(14 * GIB)
    with caplog.at_level(logging.WARNING, "alignprop_fast.generate.memory_budget"):
        sampler = train(train(DifferentiableSampler(pipe, STEPS, memory_budget=wish)))
    assert sampler.plan.budget_bytes == (2 * GIB if wish == "2GiB" else int(SHARE * 14 * GIB))
    lines = [record.getMessage() for record in caplog.records if "budget" in record.getMessage()]
    assert len(lines) == (wish != "2GiB") and all(
        "10.00 GiB" in line and "reduced to 13.58 GiB" in line for line in lines
    )


def test_what_is_free_is_seen_after_everything_has_run(pipe, emulated, monkeypatch):
    """The same if the costs are known already, because libraries take memory at their first use."""
    train(DifferentiableSampler(pipe, STEPS))
    sampler = DifferentiableSampler(pipe, STEPS)
    decode = sampler.model.decode

    def first_use(fn):
        def run(*arguments, **options):
            emulated.set_limit(TOTAL_BYTES - 4 * GIB)
            return fn(*arguments, **options)

        return run

    monkeypatch.setattr(sampler.model, "decode", first_use(decode))
    state = torch.get_rng_state()
    assert sampler.settled_budget(len(PROMPTS)) == int(SHARE * 20 * GIB)
    assert torch.equal(state, torch.get_rng_state()), "takes no random number"


def test_without_gradient_nothing_is_measured(pipe, no_measuring):
    sampler = DifferentiableSampler(pipe, STEPS)
    with torch.no_grad():
        sampler(PROMPTS, grad_steps=())
        sampler(PROMPTS)
    sampler(PROMPTS, grad_steps=())
    assert sampler.budget_bytes is None and not sampler.plan.phases


@pytest.mark.parametrize("none", [None, "none"])
def test_none_is_the_leanest_way(pipe, no_measuring, none):
    sampler = train(DifferentiableSampler(pipe, STEPS, memory_budget=none))
    assert sampler.plan.replayed_steps == (0, 1, 2) and sampler.settled_budget(2) is None


def test_segments_grow_unless_the_user_says_otherwise(pipe, monkeypatch):
    settings, change = torch._C._accelerator_getAllocatorSettings, torch._C._accelerator_setAllocatorSettings
    for said, budget, expected in (
        ("max_split_size_mb:128", None, "max_split_size_mb:128"),
        ("max_split_size_mb:128", "auto", "max_split_size_mb:128,expandable_segments:True"),
        ("expandable_segments:False", "2GiB", "expandable_segments:False"),
        ("", "2GiB", "expandable_segments:True"),
    ):
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", said)
        change(said)
        DifferentiableSampler(pipe, STEPS, memory_budget=budget)
        found = settings()
        assert found == expected


def test_measuring_locks_no_more_than_the_link_needs(pipe, emulated, monkeypatch):
    most, register = [0], emulated.register

    def registering(address, size_bytes, flags):
        most[0] = max(most[0], sum(emulated.registered.values()) + size_bytes)
        return register(address, size_bytes, flags)

    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", registering)
    sampler = DifferentiableSampler(pipe, STEPS, host_memory="1MiB", height=32, width=32)
    table = sampler.cost_table(len(PROMPTS))
    assert table.transfer_bytes > 0 and table.host_limit_bytes == 2**20
    assert most[0] == 2**26 and not emulated.registered


def test_a_driver_that_locks_less_than_planned_makes_the_next_plan_leaner(pipe, emulated, monkeypatch):
    sampler = DifferentiableSampler(pipe, STEPS, memory_budget="20GiB", host_memory="1GiB", height=32, width=32)
    solver = sampler.solver(len(PROMPTS))
    floor = min(segment.options[0].kept_bytes for segment in solver.table.step)
    assert floor >= 0
    plans = [solver.plan(range(STEPS), b) for b in range(*_range(solver))]
    offloading = next(plan for plan in plans if plan.host_bytes)
    sampler.budget_bytes, sampler.budget.is_settled = offloading.budget_bytes, True
    monkeypatch.setattr(emulated, "lockable_bytes", offloading.host_bytes // 2)
    assert train(sampler).plan.host_bytes == offloading.host_bytes
    limit_bytes = sampler.renderer.host_pool.limit_bytes
    assert limit_bytes <= offloading.host_bytes // 2
    sampler.budget_bytes = 20 * GIB
    assert train(sampler).plan.host_bytes <= limit_bytes
    assert next(iter(sampler.planner.solvers.values())).table.host_limit_bytes == limit_bytes


def _range(solver):
    from alignprop_fast.planner import BudgetInfeasible

    with pytest.raises(BudgetInfeasible) as error:
        solver.plan(range(STEPS), 1)
    least, most = error.value.smallest_bytes, solver.plan(range(STEPS), 2**50).peak_bytes
    return least, most, max(1, (most - least) // 12)
