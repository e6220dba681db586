"""The counts that the package ships are those that counting gives today: exactly, under the versions they are for."""

from importlib.metadata import version
from pathlib import Path

import pytest

from alignprop_fast.cli.kept_counts import SHIPPED
from alignprop_fast.cli.make_counts import REWARDS, counting_of, parts_of_model, parts_of_reward
from alignprop_fast.models.architectures import NAMES
from alignprop_fast.planner import CountedReward, CountedTable, unpacked

PINNED = dict(
    line.split("==") for line in (Path(__file__).parents[2] / "constraints.txt").read_text().split() if "==" in line
)
pytestmark = pytest.mark.skipif(
    any(version(name).partition("+")[0] != PINNED[name] for name in ("torch", "diffusers", "transformers", "peft")),
    reason="the shipped counts are for the versions in constraints.txt",
)
REMEDY = "what a step runs has changed: python -m alignprop_fast.cli.make_counts"


@pytest.mark.parametrize("model", NAMES)
def test_a_model_counts_as_shipped(model):
    counting = counting_of(model)
    parts = parts_of_model(counting)
    assert all(isinstance(unpacked(part.shipped.read_bytes()), CountedTable) for part in parts), REMEDY
    assert parts[0].read() == counting.count_model(parts[0]), REMEDY


@pytest.mark.parametrize("reward", REWARDS)
def test_a_reward_counts_as_shipped(reward):
    counting = counting_of("sdxl", reward)
    parts = parts_of_reward(counting, (1024, 1024))
    assert all(isinstance(unpacked(part.shipped.read_bytes()), CountedReward) for part in parts), REMEDY
    assert parts[1].read() == counting.count_reward(parts[1]), REMEDY


def test_nothing_else_is_shipped():
    named = {part.shipped for model in NAMES for part in parts_of_model(counting_of(model))}
    others = {path.name.split("-")[0] for path in set(SHIPPED.iterdir()) - named}
    assert others == {"reward"}
