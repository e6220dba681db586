"""The training loop resumes to the same bytes, and its learning rate starts and ends as stated."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from alignprop_fast.making.loop import Settings, fit

SETTINGS = Settings(steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=4, checkpoint_every=2)


def train(path, settings, stop_at=None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 24), nn.Linear(24, 24), nn.Linear(24, 1))

    def loss_at(generator):
        x = torch.randn(settings.batch_size, 3, generator=generator)
        return (network(x) - x.sum(1, keepdim=True)).square().mean()

    def on_checkpoint(step, averages):
        if step == stop_at:
            raise KeyboardInterrupt

    return network, fit({"network": network}, loss_at, settings, path, 0, on_checkpoint)["network"]


@pytest.mark.parametrize("muon", [False, True])
def test_resumed_training_equals_uninterrupted_training(tmp_path, muon):
    settings = replace(SETTINGS, muon=muon)
    whole, whole_average = train(tmp_path / "whole.pt", settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts.pt", settings, stop_at=4)
    parts, parts_average = train(tmp_path / "parts.pt", settings)
    for a, b in ((whole, parts), (whole_average, parts_average)):
        assert all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not whole[0].weight.equal(whole_average[0].weight)


def test_muon_trains_matrices_and_adamw_the_rest():
    network = nn.ModuleList([nn.Linear(24, 30), nn.Conv2d(3, 24, 3), nn.Linear(3, 24)])
    adamw, muon = replace(SETTINGS, muon=True).optimizers(list(network.parameters()))
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(30, 24), (24, 3, 3, 3)]
    assert len(adamw.param_groups[0]["params"]) == 4


def test_no_steps_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        train(tmp_path / "none.pt", SETTINGS.as_it_stands())


def test_learning_rate_warms_up_and_cools_down():
    settings = replace(SETTINGS, steps=100, cooldown=0.5)
    rates = [settings.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-2 / 4) and rates[10] == rates[49] == 1e-2
    assert rates[75] == pytest.approx(5e-3) and rates[100] == pytest.approx(0.0)
