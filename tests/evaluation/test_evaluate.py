"""Evaluation: each picture is its seed's whatever the batch, and the sums are those of the definitions."""

import math

import pytest
import torch

from alignprop_fast.evaluation.evaluate import BASE, DIVERSITY, Evaluation, Task, Variant, draw, tasks_of
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.prompts.rows import PromptRow


def rows_of(*prompts):
    return [PromptRow(prompt, {"place": i}) for i, prompt in enumerate(prompts)]


def test_tasks_count_their_seeds_as_sample_does():
    tasks = tasks_of("prompts", rows_of("a", "b"), 2, seed=5)
    assert tasks == [Task("prompts", *row) for row in (("a", 0, 5), ("a", 1, 6), ("b", 0, 7), ("b", 1, 8))]


def test_the_batch_size_changes_no_picture(tiny_sd):
    prompts, seeds = [f"prompt {i}" for i in range(5)], [3, 4, 5, 6, 7]
    sampler = DifferentiableSampler(tiny_sd, 3, 4.0)
    whole = torch.cat(list(draw(sampler, prompts, seeds, 5)))
    for size in (1, 2):
        parts = torch.cat(list(draw(sampler, prompts, seeds, size)))
        # Rounding: matrix products of another batch size sum in another order. Other noise moves pixels by 0.1.
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    other = torch.cat(list(draw(sampler, prompts, [seed + 1 for seed in seeds], 5)))
    assert (other - whole).abs().max() > 0.05


def brightness(images_BCHW, prompts, metadata):
    scores_B = images_BCHW.mean((1, 2, 3))
    return 2 * scores_B, {"bright": scores_B, "flat": torch.zeros_like(scores_B), "other": "not a part"}


@pytest.fixture
def evaluation():
    """Two prompts with two pictures each; the adapter makes three of the four brighter."""
    evaluation = Evaluation(
        brightness, ["bright", "flat"], lambda x: torch.nn.functional.normalize(x[:, :, 0, 0], dim=-1)
    )
    tasks = tasks_of("prompts", rows_of("a", "b"), 2, 0)
    for variant, levels in ((BASE, (0.1, 0.2, 0.3, 0.4)), (Variant("x", 0.5), (0.3, 0.4, 0.2, 0.5))):
        images_BCHW = torch.tensor(levels).view(4, 1, 1, 1).expand(4, 3, 8, 8)
        evaluation.add(variant, tasks[:3], images_BCHW[:3])
        evaluation.add(variant, tasks[3:], images_BCHW[3:])
    return evaluation


def test_scores_are_one_row_for_each_picture_and_part(evaluation):
    assert len(evaluation.scores) == 2 * 4 * 3
    score = evaluation.scores[-3]
    assert (score.prompt, score.number, score.seed, score.adapter, score.scale) == ("b", 1, 3, "x", 0.5)
    assert score.part == "reward" and score.value == pytest.approx(1.0)


def test_summaries(evaluation):
    rows = {(s.part, s.adapter): s for s in evaluation.summaries()}
    assert [key for key in rows if key[1] == "base"] == [
        (part, "base") for part in ("reward", "bright", "flat", DIVERSITY)
    ]
    base, changed = rows["bright", "base"], rows["bright", "x"]
    assert (base.count, base.mean, base.change, base.gained_share) == (4, pytest.approx(0.25), 0, 0)
    assert changed.mean == pytest.approx(0.35) and changed.gained_share == 0.75
    # Differences 0.2, 0.2, -0.1, 0.1: mean 0.1, squared deviations 0.01, 0.01, 0.04, 0; over 3, over 4.
    assert changed.change == pytest.approx(0.1)
    assert changed.change_standard_error == pytest.approx(math.sqrt(0.06 / 3 / 4))
    assert rows["reward", "x"].standard_error == pytest.approx(2 * changed.standard_error)
    assert rows["flat", "x"].gained_share == 0, "as good as before is no gain"
    # Grey pictures all point one way; the diversity is a mean over the two prompts.
    assert (rows[DIVERSITY, "x"].count, rows[DIVERSITY, "x"].mean) == (2, pytest.approx(0, abs=1e-6))


def test_a_prompt_that_is_given_twice_counts_twice():
    evaluation = Evaluation(lambda images, prompts, metadata: (images.mean((1, 2, 3)), {}))
    evaluation.add(
        BASE, tasks_of("prompts", rows_of("a", "a"), 1, 0), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    )
    (summary,) = evaluation.summaries()
    assert (summary.count, summary.mean) == (2, 0.5)


def test_a_value_that_is_not_finite_stays_visible():
    evaluation = Evaluation(lambda images, prompts, metadata: (images.mean((1, 2, 3)) * math.nan, {}))
    evaluation.add(BASE, tasks_of("prompts", rows_of("a", "b"), 1, 0), torch.zeros(2, 3, 4, 4))
    (summary,) = evaluation.summaries()
    assert math.isnan(summary.mean) and math.isnan(summary.standard_error)
