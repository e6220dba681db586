"""SANA's scheduler."""

import pytest

from alignprop_fast import DifferentiableSampler


def test_a_scheduler_without_flow_is_refused(tiny_sana):
    tiny_sana.scheduler = type(tiny_sana.scheduler)(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="set use_flow_sigmas=True"):
        DifferentiableSampler(tiny_sana, 2, height=32, width=32)
