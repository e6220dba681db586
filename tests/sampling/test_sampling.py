"""Coefficient tables against diffusers' DDIMScheduler, guidance rescale against diffusers, and the truncation rules."""

import random
import statistics

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from alignprop_fast.sampling import ddim_table, draw_gates, gate_count, rescaled_guidance, trl_gates


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


@pytest.mark.parametrize("rule", ["full", "last:3", "uniform", "uniform-once", "gaussian"])
def test_the_number_of_gradient_steps_is_known_before_they_are_drawn(rule):
    """The mean of 4,000 draws of at most 10 steps; the tolerance is four standard errors at the widest spread."""
    random.seed(0)
    lengths = [len(draw_gates(rule, 10)) for _ in range(4000)]
    most, mean = gate_count(rule, 10)
    assert max(lengths) <= most == (3 if rule == "last:3" else 10)
    assert abs(statistics.fmean(lengths) - mean) < 4 * 3.0 / 4000**0.5
    if rule in ("uniform-once", "gaussian"):
        assert max(lengths) == most


@pytest.mark.parametrize("rule", ["last:0", "last:5", "last", "last:x", "none", ""])
def test_bad_rules_are_refused(rule):
    for function in (draw_gates, gate_count):
        with pytest.raises(ValueError, match="truncation"):
            function(rule, 4)
