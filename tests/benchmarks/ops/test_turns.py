"""Calls take turns, one that fails says why, and times follow the work."""

import pytest
import torch

from benchmarks.ops.turns import alternate, quantiles

CPU = torch.device("cpu")


def test_quantiles():
    assert quantiles([float(i) for i in range(11)]) == pytest.approx((2.0, 5.0, 8.0))


def test_calls_alternate_and_one_that_fails_says_why():
    order = []

    def refuse():
        raise NotImplementedError("no such kernel\nand more")

    calls = {"a": lambda: order.append("a"), "b": refuse, "c": lambda: order.append("c")}
    times = alternate(calls, CPU, 0.0)
    assert order[4:] == ["a", "c"] * 3 and len(times["a"]) == len(times["c"]) == 3
    assert times["b"] == "cannot run: NotImplementedError: no such kernel"


def test_times_follow_the_work():
    a = torch.randn(300, 300)
    times = alternate({"one": lambda: a @ a, "many": lambda: [a @ a for _ in range(20)]}, CPU, 0.1)
    assert quantiles(times["many"])[1] > 5 * quantiles(times["one"])[1]
