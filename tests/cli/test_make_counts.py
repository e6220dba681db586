"""The counts that the package ships are those that counting gives today: exactly, under the versions they are for."""

from importlib.metadata import version
from pathlib import Path

import pytest

from alignprop_fast.cli.kept_counts import SHIPPED, shipped
from alignprop_fast.cli.make_counts import RANKS, REWARDS, counting_of, parts_of_model, parts_of_reward
from alignprop_fast.models.architectures import NAMES
from alignprop_fast.planner import CountedReward, CountedTable, from_text

PINNED = dict(
    line.split("==") for line in (Path(__file__).parents[2] / "constraints.txt").read_text().split() if "==" in line
)
pytestmark = pytest.mark.skipif(
    any(version(name).partition("+")[0] != PINNED[name] for name in ("torch", "diffusers", "transformers", "peft")),
    reason="the shipped counts are for the versions in constraints.txt",
)
REMEDY = "what a step runs has changed: python -m alignprop_fast.cli.make_counts"


# One of each kind of network: a UNet, double and single blocks, single blocks, linear attention.
OFTEN = ("sd15", "flux-dev", "z-image-turbo", "sana")
SELDOM = [pytest.param(name, marks=pytest.mark.slow("counted like the others")) for name in NAMES if name not in OFTEN]


@pytest.mark.parametrize("model", [*OFTEN, *SELDOM])
def test_a_model_counts_as_shipped(model):
    for rank in RANKS:
        counted = [from_text(shipped(part.shipped_in)[part.key]) for part in parts_of_model(counting_of(model, rank))]
        assert all(isinstance(one, CountedTable) for one in counted), REMEDY
    # One model at a rank other than the default one, which takes its decoder from the counts at that one.
    counting = counting_of(model, RANKS[2] if model == "sd15" else RANKS[0])
    part = parts_of_model(counting)[0]
    assert part.read() == counting.count_model(part), REMEDY


@pytest.mark.parametrize("reward", REWARDS)
def test_a_reward_counts_as_shipped(reward):
    counting = counting_of("sdxl", reward=reward)
    parts = parts_of_reward(counting, (1024, 1024))
    assert all(isinstance(from_text(shipped(part.shipped_in)[part.key]), CountedReward) for part in parts), REMEDY
    assert parts[1].read() == counting.count_reward(parts[1]), REMEDY


def test_nothing_else_is_shipped():
    named = {SHIPPED / f"{name}.xz" for name in (*NAMES, "reward")}
    assert set(SHIPPED.iterdir()) == named
    for model in NAMES:
        keys = {part.key for rank in RANKS for part in parts_of_model(counting_of(model, rank))}
        assert shipped(SHIPPED / f"{model}.xz").keys() == keys
