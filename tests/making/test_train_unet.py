"""Timesteps are spread over all noise levels; the text-to-image stage stops and goes on with the same bits."""

from dataclasses import replace

import pytest
import torch

from alignprop_fast.making import train_unet
from alignprop_fast.making.loop import Settings
from alignprop_fast.making.train_unet import spread_timesteps

CAPTIONS = ["a cat", "two dogs", "a fish", "a boat"]


def test_every_range_has_one_timestep_and_all_are_equally_likely():
    drawn = torch.stack([spread_timesteps(8, 1000, torch.Generator().manual_seed(seed)) for seed in range(2000)])
    assert (drawn // 125 == torch.arange(8)).all()
    # The mean of 16,000 uniform numbers below 1000: standard error 1000 / sqrt(12) / sqrt(8) / sqrt(16,000) = 0.8.
    assert drawn.float().mean().item() == pytest.approx(499.5, abs=4)
    assert drawn.min() == 0 and drawn.max() == 999


def test_training_goes_on_where_it_stopped_and_gives_weights_that_can_be_saved(pipe, small_unet, tmp_path, monkeypatch):
    monkeypatch.setattr(train_unet, "build_unet", lambda: small_unet(0))
    monkeypatch.setattr(train_unet, "draw", lambda *_: None)
    latents = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    four = Settings(4, 4, learning_rate=1e-3, cooldown=0.5, checkpoint_every=2)
    two = replace(four, steps=2, cooldown=1e-9)  # the same rates, and stops

    def train(settings, name):
        (tmp_path / name).mkdir(exist_ok=True)
        return train_unet.train_unet(latents, CAPTIONS, pipe.vae, pipe.tokenizer, settings, tmp_path / name, 0)

    whole = train(four, "whole")
    train(two, "parts")
    parts = train(four, "parts")
    for one, other in ((whole.unet, parts.unet), (whole.text_encoder, parts.text_encoder)):
        assert all(p.equal(q) and p.is_contiguous() for p, q in zip(one.parameters(), other.parameters(), strict=True))
    first = small_unet(0)
    assert not all(p.equal(q) for p, q in zip(whole.unet.parameters(), first.parameters(), strict=True))
