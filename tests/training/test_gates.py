"""Gates by the config's rule, and the same ones in all processes of a run."""

import random

import pytest

from alignprop_fast.sampling import Truncation, draw_truncation, euler_table
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.gates import check_rule, gate_draws, truncation_of

TABLE = euler_table([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0], range(6), "flow")


def test_the_rule_is_the_text_or_trl_s_three_fields():
    config = AlignPropConfig(sample_num_steps=6, truncation="last:2")
    assert truncation_of(config, TABLE) == draw_truncation("last:2", TABLE)
    fixed = AlignPropConfig(sample_num_steps=6, truncated_backprop_rand=False, truncated_backprop_timestep=4)
    assert truncation_of(fixed, TABLE) == Truncation.at((4, 5))
    drawn = AlignPropConfig(sample_num_steps=6, truncated_rand_backprop_minmax=(0, 6))
    random.seed(1)
    found = truncation_of(drawn, TABLE)
    random.seed(1)
    assert found.grad_steps == tuple(i for i in range(6) if i >= random.randint(0, 6))  # trl's draws, in its order
    with pytest.raises(ValueError, match="unknown truncation"):
        check_rule(AlignPropConfig(truncation="first:2"))


def test_several_processes_draw_the_same_again_and_others_in_another_micro_batch():
    config = AlignPropConfig(seed=3)
    assert gate_draws(config, 1, 0, 0) is random
    numbers = {place: gate_draws(config, 2, *place).random() for place in [(0, 0), (0, 1), (1, 0)]}
    assert len(set(numbers.values())) == 3
    assert gate_draws(config, 2, 0, 1).random() == numbers[0, 1]
