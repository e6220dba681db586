"""The training loop resumes to the same bytes, and its learning rate starts and ends as stated."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from alignprop_fast.making.loop import Settings, fit

SETTINGS = Settings(steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=4, checkpoint_every=2)


def train(path, settings, stop_at=None):
    torch.manual_seed(0)
    network = nn.Linear(3, 1)

    def loss_at(generator):
        x = torch.randn(settings.batch_size, 3, generator=generator)
        return (network(x) - x.sum(1, keepdim=True)).square().mean()

    def on_checkpoint(step, averages):
        if step == stop_at:
            raise KeyboardInterrupt

    return network, fit({"network": network}, loss_at, settings, path, 0, on_checkpoint)["network"]


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    whole, whole_average = train(tmp_path / "whole.pt", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts.pt", SETTINGS, stop_at=4)
    parts, parts_average = train(tmp_path / "parts.pt", SETTINGS)
    assert whole.weight.equal(parts.weight) and whole_average.weight.equal(parts_average.weight)
    assert not whole.weight.equal(whole_average.weight)


def test_no_steps_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        train(tmp_path / "none.pt", SETTINGS.as_it_stands())


def test_learning_rate_warms_up_and_cools_down():
    settings = replace(SETTINGS, steps=100, cooldown=0.5)
    rates = [settings.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-2 / 4) and rates[10] == rates[49] == 1e-2
    assert rates[75] == pytest.approx(5e-3) and rates[100] == pytest.approx(0.0)
