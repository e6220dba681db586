"""Coefficient tables against diffusers' DDIMScheduler, guidance rescale against diffusers, and the truncation rules."""

import random
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from alignprop_fast.sampling import (
    Gate,
    Truncation,
    ddim_table,
    dpm_solver_table,
    draw_gates,
    draw_truncation,
    euler_table,
    gate_count,
    rescaled_guidance,
    trl_gates,
)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("alpha_to_one", [False, True])
def test_ddim_table_equals_diffusers(prediction_type, eta, spacing, alpha_to_one):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        set_alpha_to_one=alpha_to_one,
        clip_sample=False,
        steps_offset=1,
    )
    # In float64: near the image fp32 loses three digits of 1 - alpha.
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
        scheduler.alphas_cumprod.double(),
        scheduler.final_alpha_cumprod.double(),
    )
    scheduler.set_timesteps(7)
    table = ddim_table(
        scheduler.alphas_cumprod.tolist(),
        float(scheduler.final_alpha_cumprod),
        scheduler.timesteps.tolist(),
        1000 // 7,
        eta,
        prediction_type,
    )
    for i, t in enumerate(scheduler.timesteps):
        x, y, z = torch.randn(3, 1, 4, 4, 4, dtype=torch.float64)
        theirs = scheduler.step(y, t, x, eta=eta, variance_noise=z if eta > 0 else None).prev_sample
        ours = table.a[i] * x + table.b[i] * y + table.sigma[i] * z
        assert torch.allclose(ours, theirs, atol=1e-10)


def chain_of(num_steps):
    """The table of a chain of flow matching."""
    return euler_table([1 - i / num_steps for i in range(num_steps + 1)], range(num_steps), "flow")


def test_zero_terminal_snr_needs_v_prediction():
    with pytest.raises(ValueError, match="v_prediction"):
        ddim_table([0.5, 0.0], 1.0, [1, 0], 1, 0.0)
    assert ddim_table([0.5, 0.0], 1.0, [1, 0], 1, 0.0, "v_prediction").a[0] == pytest.approx(0.5**0.5)


def test_rescaled_guidance_equals_diffusers():
    y = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    uncond, cond = y.chunk(2)
    theirs = rescale_noise_cfg(uncond + 5 * (cond - uncond), cond, 0.7)
    assert torch.allclose(rescaled_guidance(y, 5.0, 0.7), theirs, atol=1e-12)


def test_uniform_gates_open_with_the_probability_of_the_paper():
    random.seed(0)
    steps, draws = 10, 4000
    counts = [0] * steps
    for _ in range(draws):
        for i in draw_gates("uniform", steps):
            counts[i] += 1
    for i, count in enumerate(counts):
        p = (i + 1) / (steps + 1)
        # Five standard deviations of a binomial.
        assert abs(count / draws - p) < 5 * (p * (1 - p) / draws) ** 0.5


@pytest.mark.parametrize(("rule", "deviation"), [("uniform-once", 10 / 12**0.5), ("gaussian", 10 / 6)])
def test_drawn_once_the_last_steps_are_open(rule, deviation):
    """Mean and deviation of 4,000 draws of K; the tolerance is four standard errors of each."""
    random.seed(0)
    lengths = []
    for _ in range(4000):
        gates = draw_gates(rule, 10)
        assert gates == tuple(range(10 - len(gates), 10)) and gates
        lengths.append(len(gates))
    mean = statistics.fmean(lengths)
    assert abs(mean - (5.5 if rule == "uniform-once" else 5)) < 4 * deviation / 4000**0.5
    assert abs(statistics.stdev(lengths) - deviation) < 0.1


def test_gates_draw_random_numbers_in_trls_order():
    random.seed(4)
    expected = tuple(i for i in range(12) if not i < random.randint(0, 50))
    random.seed(4)
    assert trl_gates(12, True, 49, (0, 50)) == expected


def test_fixed_rules():
    assert draw_gates("full", 4) == (0, 1, 2, 3)
    assert draw_gates("last:2", 4) == (2, 3)
    assert trl_gates(4, False, 3, (0, 50)) == (3,)
    with pytest.raises(ValueError, match="at most 3"):
        trl_gates(4, False, 4, (0, 50))


BAD = [
    "last:0",
    "last:5",
    "last",
    "last:x",
    "none",
    "",
    "lv",
    "lv:0",
    "lv:-1",
    "drtune:0",
    "drtune:5",
    "drtune:",
    "refl:2",
]


@pytest.mark.parametrize("rule", BAD)
def test_bad_rules_are_refused(rule):
    with pytest.raises(ValueError, match="truncation") as error:
        draw_truncation(rule, chain_of(4))
    assert "\n" not in str(error.value)


def test_rules_that_cut_more_than_gates():
    random.seed(0)
    assert draw_truncation("last:2", chain_of(4)) == Truncation.at((2, 3))
    assert draw_truncation("lv:3", chain_of(4)) == Truncation.at((3,), renoise_steps=(3, 3, 3))
    drawn = [draw_truncation("refl", chain_of(40)) for _ in range(400)]
    assert {cut.last_step for cut in drawn} == set(range(30, 40))  # the last quarter
    assert all(cut.gates == (Gate(cut.last_step),) for cut in drawn)
    assert draw_truncation("refl", chain_of(1)) == Truncation.at((0,), last_step=0)


@pytest.mark.parametrize(("rule", "steps", "count"), [("drtune", 50, 5), ("drtune:3", 50, 3), ("drtune", 3, 3)])
def test_drtune_trains_equally_spaced_steps_before_a_drawn_end(rule, steps, count):
    random.seed(0)
    drawn = [draw_truncation(rule, chain_of(steps)) for _ in range(2000)]
    stop = max(1, round(0.4 * steps))
    assert {cut.last_step for cut in drawn} == set(range(steps - stop, steps))
    for cut in drawn:
        grad_steps, end = cut.grad_steps, cut.last_step
        assert len(grad_steps) == min(count, end + 1) and grad_steps[0] >= 0 and grad_steps[-1] <= end
        assert len({b - a for a, b in pairwise(grad_steps)}) <= 1
        assert all(gate.weight == 1 and gate.input_scale == 0 for gate in cut.gates)
    assert {step for cut in drawn for step in cut.grad_steps} == set(range(steps))  # every step is drawn


@pytest.mark.parametrize(
    "rule", ["full", "last:3", "uniform", "uniform-once", "gaussian", "lv:2", "drtune", "drtune:2", "refl"]
)
def test_gate_count_is_that_of_the_draws(rule):
    """The mean of 2,000 draws of at most 12 steps has a standard error below 0.08."""
    random.seed(0)
    most, mean = gate_count(rule, 12)
    counts = [len(draw_truncation(rule, chain_of(12)).grad_steps) for _ in range(2000)]
    assert max(counts) <= most and abs(statistics.fmean(counts) - mean) < 0.3
    state = random.getstate()
    gate_count(rule, 12)
    assert random.getstate() == state


def test_auto_opens_every_step_of_a_short_chain_and_draws_those_of_a_long_one():
    assert draw_truncation("auto", chain_of(8)) == draw_truncation("full", chain_of(8))
    assert gate_count("auto", 8) == (8, 8.0) and gate_count("auto", 9) == gate_count("uniform", 9)
    random.seed(0)
    expected = draw_truncation("uniform", chain_of(9))
    random.seed(0)
    assert draw_truncation("auto", chain_of(9)) == expected


def test_gate_count_refuses_what_cannot_be_drawn():
    for rule in ("drtune:13", "lv:0", "none"):
        with pytest.raises(ValueError, match="truncation"):
            gate_count(rule, 12)


def every_table():
    sigmas = (3.0, 1.5, 0.6, 0.0)
    for kind in ("epsilon", "v_prediction", "sample"):
        yield kind, ddim_table([0.9, 0.6, 0.3, 0.1], 1.0, [3, 2, 1], 1, 0.7, kind)
        yield kind, euler_table(sigmas, (9, 5, 1), kind, ancestral=True)
        yield kind, dpm_solver_table(sigmas, (9, 5, 1), kind, second_order_steps=(1,))
    yield "flow", euler_table((0.9, 0.5, 0.2, 0.0), (9, 5, 1), "flow")


@pytest.mark.parametrize(("kind", "table"), every_table())
def test_every_step_knows_its_level_and_its_clean_latents(kind, table):
    """A perfect network recovers the clean latents from latents at a step's level."""
    clean, z = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for (signal, noise), (d, e) in zip(table.level, table.x0, strict=True):
        alpha = signal**2 / (signal**2 + noise**2)
        perfect = {"epsilon": z, "v_prediction": alpha**0.5 * z - (1 - alpha) ** 0.5 * clean, "sample": clean}
        y = perfect[kind] if kind in perfect else z - clean
        assert torch.allclose(d * (signal * clean + noise * z) + e * y, clean, atol=1e-12)
    short, alone = table.ending_at(1), table.alone(len(table) - 1)[0]
    assert len(short) == 2 and short.a[0] == table.a[0] and short.sigma[1] == 0 and short.noisy == table.noisy
    assert (short.a[1], short.b[1]) == table.x0[1] and (alone.a[0], alone.b[0]) == table.x0[2]
    assert alone.timesteps == table.timesteps[2:] and alone.input_scale == table.input_scale[2:]
    assert len(short.history) == (2 if table.history else 0) and all(c == 0 for c, _, _ in alone.history)
    if table.history:
        assert short.history[0] == table.history[0] and short.history[1][0] == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_levels_and_clean_latents_are_those_of_diffusers(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(7)
    table = ddim_table(scheduler.alphas_cumprod.tolist(), 1.0, scheduler.timesteps.tolist(), 142, 1.0, prediction_type)
    x, y, z = torch.randn(3, 1, 4, 4, 4, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        (d, e), (signal, noise) = table.x0[i], table.level[i]
        assert torch.allclose(d * x + e * y, scheduler.step(y, t, x, eta=0.0).pred_original_sample, atol=1e-10)
        # add_noise works in fp32
        assert torch.allclose(signal * x + noise * z, scheduler.add_noise(x, z, t[None]), atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_chain_that_ends_early_predicts_the_clean_latents(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(7)
    table = ddim_table(scheduler.alphas_cumprod.tolist(), 1.0, scheduler.timesteps.tolist(), 142, 1.0, prediction_type)
    short = table.ending_at(4)
    assert len(short) == 5 and short.a[:4] == table.a[:4] and short.sigma[4] == 0
    alone = table.alone(len(table) - 1)[0]
    x, y = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    for one, t in ((short, scheduler.timesteps[4]), (alone, scheduler.timesteps[-1])):
        theirs = scheduler.step(y, t, x, eta=0.0).pred_original_sample
        assert torch.allclose(one.a[-1] * x + one.b[-1] * y, theirs, atol=1e-10)
        assert one.timesteps[-1] == t
    signal, noise = table.level_of(len(table) - 1)
    z = torch.randn_like(x)
    theirs = scheduler.add_noise(x, z, scheduler.timesteps[-1:])
    assert torch.allclose(signal * x + noise * z, theirs, atol=1e-7)  # add_noise works in fp32


def test_a_table_without_x0_says_what_to_use():
    table = replace(ddim_table([0.9, 0.5], 1.0, [1, 0], 1, 0.0), x0=())
    with pytest.raises(ValueError, match="runs the whole chain"):
        table.ending_at(0)


@pytest.mark.parametrize("rule", ["full", "last:3", "lv:3", "drtune:3", "refl", "uniform", "uniform-once", "gaussian"])
def test_the_number_of_gradient_steps_is_known_before_they_are_drawn(rule):
    """The mean of 4,000 draws of at most 10 steps; the tolerance is four standard errors at the widest spread."""
    random.seed(0)
    lengths = [len(draw_truncation(rule, chain_of(10)).grad_steps) for _ in range(4000)]
    most, mean = gate_count(rule, 10)
    assert max(lengths) <= most == {"last:3": 3, "drtune:3": 3, "lv:3": 1, "refl": 1}.get(rule, 10)
    assert abs(statistics.fmean(lengths) - mean) < 4 * 3.0 / 4000**0.5
    if rule in ("uniform-once", "gaussian"):
        assert max(lengths) == most


@pytest.mark.parametrize("rule", BAD)
def test_bad_rules_have_no_number_of_steps(rule):
    with pytest.raises(ValueError, match="truncation"):
        gate_count(rule, 4)


@pytest.mark.parametrize("rule", ["lv:2", "refl", "drtune", "drtune:7", "drtune:10"])
def test_gradient_steps_of_rules_that_cut_more_are_counted_without_a_draw(rule):
    random.seed(0)
    state = random.getstate()
    most, mean = gate_count(rule, 10)
    assert random.getstate() == state
    lengths = [len(draw_truncation(rule, chain_of(10)).grad_steps) for _ in range(2000)]
    assert max(lengths) == most
    assert abs(statistics.fmean(lengths) - mean) < 4 * 1.2 / 2000**0.5  # four standard errors at the widest spread
    with pytest.raises(ValueError, match="use 1 to 4"):
        gate_count("drtune:5", 4)
