"""The measured choice between implementations, with two real ones of very different cost."""

import pytest
import torch

from alignprop_fast.ops import choice

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(choice.Path, "home", lambda: tmp_path)
    choice._table.cache_clear()
    yield
    choice._table.cache_clear()


def candidates(calls=None):
    def product(side):
        x = torch.ones(side, side)

        def run():
            if calls is not None:
                calls.append(side)
            return x @ x

        return run

    def refuses():
        raise RuntimeError("needs another GPU\nand more words")

    return {"large": product(512), "refuses": refuses, "small": product(8)}


def test_the_fastest_is_taken_and_the_others_explained():
    assert choice.fastest("product", candidates, CPU) == "small"
    text = choice.explain("product", CPU)
    assert "large" in text and "small" in text and "refuses: needs another GPU" in text and "more words" not in text


def test_measured_once_then_read_from_disk():
    calls = []
    choice.fastest("product", lambda: candidates(calls), CPU)
    assert calls
    calls.clear()
    choice._table.cache_clear()
    assert choice.fastest("product", lambda: candidates(calls), CPU) == "small"
    assert not calls


def test_a_damaged_or_unwritable_cache_is_no_obstacle(tmp_path):
    choice.fastest("product", candidates, CPU)
    next((tmp_path / ".cache" / "alignprop_fast").glob("*.json")).write_text("{")
    choice._table.cache_clear()
    assert choice.fastest("product", candidates, CPU) == "small"


def test_nothing_can_run():
    with pytest.raises(RuntimeError, match="needs another GPU"):
        choice.fastest("none", lambda: {"refuses": candidates()["refuses"]}, CPU)
