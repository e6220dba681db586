"""Accelerate's set-up. test_launcher.py tests its settings in the environment."""

import pytest

from alignprop_fast.training.placement import make_deterministic


def test_an_environment_that_is_not_deterministic_is_refused(monkeypatch):
    """torch would fail at the first matrix product, in the middle of set-up and with several lines."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 is not deterministic: use :4096:8"):
        make_deterministic()
