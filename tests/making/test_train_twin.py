"""The twin's losses on small networks: steps are DDIM's, the teacher lands where DDIM does, equals have no loss."""

import copy

import pytest
import torch

from alignprop_fast.making import train_twin
from alignprop_fast.making.networks import build_scheduler
from alignprop_fast.making.train_twin import Distillation, step_to, velocity_to

CAPTIONS = ["a cat", "two dogs on a blue background", "a fish and a boat"]
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # fp32, up to 16 evaluations in a row; the latents are of unit size


@pytest.fixture
def distillation(pipe):
    return Distillation(pipe, CAPTIONS, batch_size=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_turn_is_the_step_of_diffusers_ddim(distillation):
    scheduler = build_scheduler()
    scheduler.set_timesteps(4)
    assert distillation.timesteps == scheduler.timesteps.tolist()
    x, v = torch.randn(2, 2, 2, 4, 4, generator=generator()).unbind()
    for timestep in distillation.timesteps:
        ours = step_to(x, v, distillation.turn(timestep, distillation.stride))
        torch.testing.assert_close(ours, scheduler.step(v, timestep, x).prev_sample, **ROUNDING)
        there = velocity_to(x, ours, distillation.turn(timestep, distillation.stride))
        torch.testing.assert_close(there, v, **ROUNDING)


def test_the_teacher_lands_where_guided_ddim_does(distillation, pipe, monkeypatch):
    """All four stretches together are one chain of 16 guided steps of the pipeline."""
    monkeypatch.setattr(train_twin, "SMALL_STEPS", 4)
    x, text, empty = distillation.draw_start(generator())
    latents = pipe(
        prompt_embeds=text,
        negative_prompt_embeds=empty,
        latents=x,
        num_inference_steps=16,
        guidance_scale=train_twin.GUIDANCE_SCALE,
        output_type="latent",
    ).images
    for timestep in distillation.timesteps:
        x = distillation.teacher_lands(x, timestep, text, empty)
    # The pipeline's 16 steps are rounded to whole timesteps in another way: 937 where the stretch has 936.
    torch.testing.assert_close(x, latents, rtol=0.02, atol=0.02)


def test_a_twin_that_is_its_own_teacher_has_nothing_to_follow(distillation, pipe, small_unet, monkeypatch):
    monkeypatch.setattr(train_twin, "SMALL_STEPS", 1)
    monkeypatch.setattr(train_twin, "GUIDANCE_SCALE", 1.0)
    assert distillation.loss(pipe.unet, generator()).item() < 1e-8
    assert distillation.loss(small_unet(1), generator()).item() > 1e-3


def test_the_twin_follows_from_where_its_own_steps_bring_it(distillation, pipe, small_unet, monkeypatch):
    monkeypatch.setattr(train_twin, "SMALL_STEPS", 1)
    twin, seen = small_unet(1), []
    twin.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        distillation.loss(twin, generator())
    x, text, _ = distillation.draw_start(generator())
    chain = []
    own = copy.copy(pipe)
    own.unet, own.scheduler = twin, build_scheduler()
    own(
        prompt_embeds=text,
        latents=x,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, values: chain.append(values["latents"]) or values,
    )
    for ours, theirs in zip(seen[:4], [x, *chain[:3]], strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)


def test_guidance_and_small_steps_leave_something_to_follow(distillation, pipe):
    assert distillation.loss(pipe.unet, generator()).item() > 1e-8


def test_the_training_goes_on_where_it_stopped(pipe, tmp_path, monkeypatch):
    from alignprop_fast.making.loop import Settings

    monkeypatch.setattr(train_twin, "draw", lambda *arguments, **options: None)
    monkeypatch.setattr(train_twin, "SMALL_STEPS", 1)
    four = Settings(4, 2, learning_rate=1e-3, cooldown=0.25, checkpoint_every=1)
    two = Settings(2, 2, learning_rate=1e-3, cooldown=1e-9, checkpoint_every=1)  # the same rates, and stops
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train_twin.train_twin(pipe, CAPTIONS, two, tmp_path / "parts", seed=0)
    unets = [train_twin.train_twin(pipe, CAPTIONS, four, tmp_path / name, seed=0) for name in ("whole", "parts")]
    for one, other in zip(*(unet.parameters() for unet in unets), strict=True):
        assert one.equal(other)
