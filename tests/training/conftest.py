"""What tests of trainers share."""

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state per process, so a trainer of another precision would be refused."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
