"""Early stopping: when it stops, what it keeps; watching: the same pictures each time, and nothing of training's."""

import math
import random

import pytest
import torch

from alignprop_fast.evaluation.early_stopping import EarlyStopping
from alignprop_fast.evaluation.watch import Watch
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.prompts.rows import PromptRow
from alignprop_fast.rewards import get_reward


def run(scores, patience=2, max_drop=0.0):
    """Evaluations after steps 0, 10, ...; the parameter is the step. Ends where it stops; returns (stopping, steps)."""
    stopping, parameter = EarlyStopping(patience, max_drop), torch.nn.Parameter(torch.zeros(1))
    for i, score in enumerate(scores):
        parameter.data.fill_(10 * i)
        stopping.update(10 * i, score, [parameter])
        if stopping.stop:
            break
    stopping.restore([parameter])
    assert parameter.item() == stopping.kept_step
    return stopping.kept_step, 10 * i


@pytest.mark.parametrize(
    ("scores", "patience", "max_drop", "kept", "ended"),
    [
        ([1, 2, 3, 4], 1, 0.0, 30, 30),
        ([1, 2, 1.5, 1.4, 5], 2, 0.0, 10, 30),
        ([1, 2, 1.5, 2, 1.4, 1.3, 5], 2, 0.0, 30, 50),  # as good as the best counts as good
        ([1, 2, 1.8, 1.5, 1.4], 2, 0.25, 20, 40),  # within the tolerance the later one is kept
        ([1, 2, 1.8, 1.7, 1.9, 1.8], 1, 0.25, 20, 30),  # the drop is from the best, not from the last
        ([1, math.nan, math.nan], 2, 0.0, 0, 20),
        ([1, 2, math.nan, 1.9], 2, 0.0, 10, 30),
    ],
)
def test_it_stops_after_a_fall_and_keeps_what_was_before(scores, patience, max_drop, kept, ended):
    assert run(scores, patience, max_drop) == (kept, ended)


def test_its_state_goes_through_a_checkpoint(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    first = EarlyStopping(3)
    first.update(0, 1.0, [parameter])
    parameter.data.zero_()
    first.update(5, 0.5, [parameter])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = EarlyStopping(2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not second.stop
    second.update(10, 0.9, [parameter])
    assert second.stop and second.kept_step == 0
    second.restore([parameter])
    assert parameter.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("values", "match"), [((0, 0.0), "at least 1"), ((1, -1.0), "0 or more"), ((1, math.nan), "0 or")]
)
def test_values_that_cannot_work_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        EarlyStopping(*values)


def test_a_watch_looks_at_the_same_pictures_and_draws_no_random_numbers(tiny_sd):
    def embed(images):
        return torch.nn.functional.normalize(images.flatten(1) - 0.5, dim=1)

    reward = get_reward("colorfulness,compressibility")
    watch = Watch(reward, [PromptRow("a cat"), PromptRow("a dog")], embed, seed=5, batch_size=3)
    sampler = DifferentiableSampler(tiny_sd, 2)
    states = torch.get_rng_state(), random.getstate()
    first, second = watch.look(sampler), watch.look(sampler)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert first == second and first.diversity > 0
    assert first.reward == pytest.approx(first.parts["colorfulness"] + first.parts["compressibility"], rel=1e-5)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(4)]
    with torch.no_grad():
        images = sampler(["a cat", "a cat", "a dog", "a dog"], None, generators)
    assert first.reward == pytest.approx(reward(images, [""] * 4, [{}] * 4)[0].mean().item(), rel=1e-4)
    one = embed(images)
    assert first.diversity == pytest.approx(1 - ((one[0] @ one[1] + one[2] @ one[3]) / 2).item(), abs=1e-4)
    assert set(first.to_log()) == {"watch/reward", "watch/diversity", "watch/colorfulness", "watch/compressibility"}


@pytest.mark.parametrize("watched", ["clip", None])
def test_the_plan_knows_the_weights_of_what_is_watched(watched, tiny_sd_folder, tmp_path):
    from accelerate.state import AcceleratorState, GradientState
    from rich.console import Console

    from alignprop_fast.cli.folder import OutputFolder
    from alignprop_fast.cli.set_up import set_up
    from alignprop_fast.training.options import TrainOptions

    options = {"model": str(tiny_sd_folder), "num_inference_steps": 1, "batch_size": 2, "watch_pictures": 2}
    output = {"output_dir": str(tmp_path / "run"), "device": "cpu"}
    chosen = TrainOptions(reward="clip", watch_reward=watched, watch_prompts="demo", **options, **output)
    with OutputFolder(chosen.output_dir) as folder:
        session = set_up(chosen, Console(quiet=True), folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    clip_bytes = session.reward.weight_bytes()
    embedder_bytes = sum(t.numel() * t.element_size() for t in session.watch.embed.state_dict().values())
    extra_bytes = session.trainer.sampler.reward_bytes - clip_bytes
    assert extra_bytes - embedder_bytes == pytest.approx(clip_bytes if watched else 0, abs=4096)  # positions: buffers
