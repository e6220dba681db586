"""Options of a block: one value from the table's text to the block that runs under it."""

import pytest

from alignprop_fast.planner import GRADES, BlockOption
from alignprop_fast.runtime.blocks import KEPT


def test_each_grade_is_there_on_the_device_and_offloaded():
    assert len(BlockOption) == 2 * len(GRADES) and set(KEPT) == set(GRADES)
    assert (GRADES[0], GRADES[-1]) == (BlockOption.KEEP, BlockOption.RECOMPUTE)
    for option in BlockOption:
        assert option.offload == (option not in GRADES)
        assert option in (option.grade, option.offloaded) and option.grade in GRADES and option.offloaded.offload


def test_its_text_is_that_of_tables_and_plans():
    assert BlockOption("recompute+offload") is BlockOption.RECOMPUTE_OFFLOADED
    assert f"{BlockOption.QKV} x 3" == "qkv x 3" and str(BlockOption.QKV_OFFLOADED) == "qkv+offload"


@pytest.mark.parametrize("text", ["everything", "keep+", "+offload", ""])
def test_another_text_is_refused(text):
    with pytest.raises(ValueError, match=r"unknown option .* of a block: use keep, norms, .*, recompute\+offload"):
        BlockOption(text)
