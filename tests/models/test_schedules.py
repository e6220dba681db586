"""Tables against diffusers' schedulers: the same latents after a chain with given predictions, for every option.

Tolerance: the schedulers compute in fp32, with logarithms; measured up to 5e-7 of the largest latent, asserted at 1e-5.
"""

import diffusers
import pytest
import torch

from alignprop_fast.models.schedules import DIFFUSION, check_scheduler, make_scheduler, schedule
from alignprop_fast.sampling import Update, make_table

BASE = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).config


def assert_equal_chains(name, scheduler, steps, set_timesteps=None):
    """Run both with the same predictions and noise."""
    (set_timesteps or (lambda s: s.set_timesteps(steps)))(scheduler)
    table = make_table(schedule(name, scheduler), eta=0.7)
    update = Update(table, (1.0,))
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(1, 4, 6, 6, generator=generator) * scheduler.init_noise_sigma
        if name != "flow-euler"
        else (torch.randn(1, 4, 6, 6, generator=generator))
    )
    state = update.start(x.double())
    theirs_noise, ours_noise = (torch.Generator().manual_seed(1) for _ in range(2))
    for i, t in enumerate(scheduler.timesteps):
        assert float(t) == table.timesteps[i]
        y = torch.randn(1, 4, 6, 6, generator=generator)
        if name != "flow-euler":
            seen = scheduler.scale_model_input(x, t)
            assert (update.model_input(i, state) - seen).abs().max() < 1e-5 * seen.abs().max()
        eta = {"eta": 0.7} if name == "ddim" else {}
        x = scheduler.step(y, t, x, generator=theirs_noise, **eta).prev_sample
        noise = torch.randn(1, 4, 6, 6, generator=ours_noise).double() if table.noisy else None
        state = update.advance(i, state, y.double(), noise)
    assert len(table) == len(scheduler.timesteps)
    assert torch.equal(theirs_noise.get_state(), ours_noise.get_state())
    assert (update.latents(state) - x).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_every_spacing_and_prediction_type(name, prediction_type, spacing, steps):
    config = {**BASE, "prediction_type": prediction_type, "timestep_spacing": spacing}
    assert_equal_chains(name, make_scheduler(name, config), steps)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {"use_karras_sigmas": True}),
        ("euler", {"use_exponential_sigmas": True}),
        ("euler", {"final_sigmas_type": "sigma_min", "prediction_type": "sample"}),
        ("euler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        ("dpm++2m", {"use_karras_sigmas": True}),
        ("dpm++2m", {"solver_type": "heun"}),
        ("dpm++2m", {"solver_order": 1}),
        ("dpm++2m", {"final_sigmas_type": "sigma_min"}),
        ("dpm++2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False, "prediction_type": "sample"}),
        ("dpm++2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ],
)
@pytest.mark.parametrize("steps", [8, 16])
def test_options(name, options, steps):
    assert_equal_chains(name, make_scheduler(name, {**BASE, **options}), steps)


@pytest.mark.parametrize(
    ("options", "mu"), [({"shift": 3.0}, None), ({"use_dynamic_shifting": True}, 0.8), ({"shift_terminal": 0.1}, None)]
)
def test_flow_matching(options, mu):
    scheduler = make_scheduler("flow-euler", options)
    assert_equal_chains("flow-euler", scheduler, 6, lambda s: s.set_timesteps(6, mu=mu))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.PNDMScheduler(), "DDIMScheduler, EulerDiscreteScheduler, EulerAncestral.*DPMSolverMultistep"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is not supported here"),
        (diffusers.DDIMScheduler(clip_sample=True), "clip_sample=False"),
        (diffusers.DPMSolverMultistepScheduler(thresholding=True), "thresholding=False"),
        (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "algorithm_type='dpmsolver\\+\\+'"),
        (diffusers.DPMSolverMultistepScheduler(solver_order=3), "solver_order=2"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler, DIFFUSION)


def test_an_option_of_another_class_is_no_option():
    """diffusers keeps unknown settings in the config."""
    config = diffusers.DDIMScheduler(clip_sample=True, thresholding=True).config
    assert check_scheduler(make_scheduler("euler", config), DIFFUSION) == "euler"
    assert check_scheduler(make_scheduler("ddim", config), DIFFUSION) == "ddim"


def test_stochastic_flow_is_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling=False"):
        check_scheduler(scheduler, ("flow-euler",))


@pytest.mark.parametrize("name", [*DIFFUSION, "flow-euler"])
def test_a_chain_may_end_in_the_clean_latents(name):
    """At signal x0 + noise z the exact prediction gives x0; a chain that ends early follows the whole one."""
    scheduler = make_scheduler(name, {} if name == "flow-euler" else BASE)
    scheduler.set_timesteps(6)
    table = make_table(schedule(name, scheduler), eta=0.5)
    clean, noise, *predictions = torch.randn(8, 1, 4, 3, 3, dtype=torch.float64)
    for i, (c, d) in enumerate(table.x0):
        signal, level = table.level[i]
        exact = noise - clean if name == "flow-euler" else noise
        assert torch.allclose(c * (signal * clean + level * noise) + d * exact, clean, atol=1e-9)
    update, short = Update(table, (1.0,)), Update(table.ending_at(3), (1.0,))
    state, ending = update.start(table.init_scale * noise), short.start(table.init_scale * noise)
    for i in range(4):
        x = update.latents(state)
        assert torch.equal(short.model_input(i, ending), update.model_input(i, state))
        state, ending = (u.advance(i, s, predictions[i], None) for u, s in ((update, state), (short, ending)))
    c, d = table.x0[3]
    assert torch.allclose(short.latents(ending), c * x + d * predictions[3], atol=1e-12)
    assert len(short.table) == 4 and len(table.alone(len(table) - 1)[0]) == 1
