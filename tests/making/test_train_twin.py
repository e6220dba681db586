"""The twin's losses on small networks: steps are DDIM's, the teacher leads where it says, what is equal is zero."""

import copy

import pytest
import torch

from alignprop_fast.making import train_twin
from alignprop_fast.making.networks import build_scheduler
from alignprop_fast.making.train_twin import Distillation, TwinTraining, step_to, trainable, velocity_to

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
    assert distillation.follow_loss(pipe.unet, generator()).item() < 1e-8
    assert distillation.follow_loss(small_unet(1), generator()).item() > 1e-3


def test_the_twin_follows_from_where_its_own_steps_bring_it(distillation, pipe, small_unet, monkeypatch):
    monkeypatch.setattr(train_twin, "SMALL_STEPS", 1)
    twin, seen = small_unet(1), []
    twin.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        distillation.follow_loss(twin, generator())
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
    assert distillation.follow_loss(pipe.unet, generator()).item() > 1e-8


def test_where_critic_and_teacher_agree_the_picture_stays(distillation, pipe, small_unet, monkeypatch):
    monkeypatch.setattr(train_twin, "GUIDANCE_SCALE", 1.0)
    picture, text, empty = distillation.draw_start(generator())
    assert distillation.match_gradient(pipe.unet, picture, text, empty, generator(1)).abs().max() < 1e-3
    other = distillation.match_gradient(small_unet(1), picture, text, empty, generator(1))
    assert other.abs().mean() > 1e-2


def test_matching_moves_a_picture_towards_what_the_teacher_makes_of_it(distillation):
    """The teacher sees zeros and the critic the picture itself: the gradient is the picture, of unit mean size."""
    distillation.guided = lambda x, timesteps, text, empty: x * turn(timesteps).cos() / turn(timesteps).sin()

    def turn(timesteps):
        return distillation.angles[timesteps].reshape(-1, 1, 1, 1)

    def critic(x, timesteps, text):
        v = (turn(timesteps).cos() * x - picture) / turn(timesteps).sin()
        return type("Output", (), {"sample": v})

    picture, text, empty = distillation.draw_start(generator())
    gradient = distillation.match_gradient(critic, picture, text, empty, generator(1))
    torch.testing.assert_close(gradient, picture / picture.abs().mean((1, 2, 3), keepdim=True), **ROUNDING)


def test_the_critic_learns_v_of_diffusers(distillation):
    picture, text, _ = distillation.draw_start(generator())
    seen = {}

    def critic(x, timesteps, text):
        seen.update(x=x, timesteps=timesteps)
        return type("Output", (), {"sample": torch.ones_like(x)})

    loss = distillation.critic_loss(critic, picture, text, generator(1))
    scheduler, again = build_scheduler(), generator(1)
    torch.rand(2, generator=again)
    noise = torch.randn(picture.shape, generator=again)
    torch.testing.assert_close(seen["x"], scheduler.add_noise(picture, noise, seen["timesteps"]), **ROUNDING)
    wanted = (1 - scheduler.get_velocity(picture, noise, seen["timesteps"])).square().mean()
    torch.testing.assert_close(loss, wanted, **ROUNDING)


def test_matching_trains_twin_and_critic_by_their_own_losses_alone(distillation, pipe, small_unet):
    twin, critic = trainable(pipe.unet), trainable(small_unet(1))
    distillation.match_loss(twin, critic, generator()).backward()
    assert all(any(p.grad.abs().max() > 0 for p in network.parameters()) for network in (twin, critic))
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    by_both = [parameter.grad.clone() for parameter in critic.parameters()]
    critic.zero_grad()
    again = generator()
    x, text, empty = distillation.draw_start(again)
    with torch.no_grad():
        for timestep in distillation.timesteps:
            x = step_to(x, twin(x, timestep, text).sample, distillation.turn(timestep, distillation.stride))
    distillation.match_gradient(critic, x, text, empty, again)
    distillation.critic_loss(critic, x, text, again).backward()
    for parameter, grad in zip(critic.parameters(), by_both, strict=True):
        torch.testing.assert_close(parameter.grad, grad, **ROUNDING)


def test_both_stages_go_on_where_they_stopped(pipe, tmp_path, monkeypatch):
    from alignprop_fast.making.loop import Settings

    monkeypatch.setattr(TwinTraining, "preview", lambda self, step, averages: None)
    monkeypatch.setattr(train_twin, "SMALL_STEPS", 1)
    four = Settings(4, 2, learning_rate=1e-3, cooldown=0.25, checkpoint_every=1)
    two = Settings(2, 2, learning_rate=1e-3, cooldown=1e-9, checkpoint_every=1)  # the same rates, and stops
    whole, parts = (TwinTraining(pipe, CAPTIONS, tmp_path / name, seed=0) for name in ("whole", "parts"))
    for training in (whole, parts):
        training.folder.mkdir()
    parts.match(parts.follow(two), two)
    for stage in ("follow", "match"):
        (tmp_path / "parts" / f"{stage}.pt").replace(tmp_path / "parts" / f"half-{stage}.pt")
    (tmp_path / "parts" / "half-follow.pt").replace(tmp_path / "parts" / "follow.pt")
    unets = [training.match(training.follow(four), four) for training in (whole, parts)]
    for one, other in zip(*(unet.parameters() for unet in unets), strict=True):
        assert one.equal(other)
