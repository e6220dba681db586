"""Accelerate's set-up; what the environment does to it: test_launcher.py."""

import pytest

from alignprop_fast.training.placement import make_deterministic


def test_an_environment_that_is_not_deterministic_is_refused(monkeypatch):
    """torch would refuse the first matrix product, in the middle of set-up and in several lines."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 is not deterministic: use :4096:8"):
        make_deterministic()
