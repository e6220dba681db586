"""The trainer on a device that runs out of memory: the step is repeated under a leaner plan, or the message helps."""

import random

import pytest
import torch

from .tiny_trainer import make_config, make_trainer, ramp_reward, weights


class FailsOnce:
    """A reward that runs out of memory at its third call in training."""

    def __init__(self, times=1):
        self.times, self.calls, self.seen = times, 0, []

    def __call__(self, images_BCHW, prompts, metadata):
        if not images_BCHW.detach().any():  # black pictures, used to measure costs
            return ramp_reward(images_BCHW, prompts, metadata)
        if self.calls == 2 and self.times:
            self.times -= 1
            torch.rand(3), random.random()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        self.calls += 1
        self.seen.append(tuple(prompts))
        return ramp_reward(images_BCHW, prompts, metadata)


def test_out_of_memory_repeats_the_step_with_a_leaner_plan(tiny_sd_folder, tmp_path, caplog):
    """The same prompts, noise and weights as a run that never failed; the budget is lower from then on. Learning rate
    and average change once per step."""
    trainers, rates = [], []
    for name, times in (("never", 0), ("once", 1)):
        config = make_config(tmp_path / name, memory_budget="8GiB", lr_scheduler="linear", ema_decay=0.5)
        trainer = make_trainer(tiny_sd_folder, config, FailsOnce(times))
        rates.append([metrics.learning_rate for metrics in trainer.steps()])
        trainers.append(trainer)
    never, once = trainers
    assert rates[0] == rates[1] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    averages = [trainer.update.average.state_dict() for trainer in trainers]
    assert averages[0]["updates"] == averages[1]["updates"] == 3
    torch.testing.assert_close(averages[0]["weights"], averages[1]["weights"], rtol=0, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(never), weights(once), strict=True))
    assert once.reward_fn.seen == never.reward_fn.seen
    assert once.sampler.budget_bytes < never.sampler.budget_bytes == 8 * 2**30
    lines = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(lines) == 1 and "repeated" in lines[0]


def test_out_of_memory_in_a_noising_repeats_that_one_alone(tiny_sd_folder, tmp_path):
    """The third reward query is for the second noising, after two backward passes that must not count twice."""
    trainers = []
    for name, times in (("never", 0), ("once", 1)):
        config = make_config(tmp_path / name, memory_budget="8GiB", truncation="lv:2", num_epochs=2)
        trainers.append(make_trainer(tiny_sd_folder, config, FailsOnce(times)))
        trainers[-1].train()
    # A leaner plan sums in another order, which Adam's first steps amplify; counting twice moves weights by 5e-4.
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*map(weights, trainers), strict=True))
    assert trainers[1].sampler.budget_bytes < trainers[0].sampler.budget_bytes


def test_out_of_memory_without_a_leaner_plan_says_what_to_change(tiny_sd_folder, tmp_path):
    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path, memory_budget="8GiB"), FailsOnce(times=1000))
    with pytest.raises(torch.OutOfMemoryError, match=r"no leaner plan: use .*batch"):
        trainer.train()
