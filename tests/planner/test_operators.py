"""Operators add like vectors, and their seconds are the sum of those of each."""

from alignprop_fast.planner import Operator, Operators

PRODUCT, COPY = Operator(8.0, 4, "bfloat16"), Operator(0.0, 16, "float32")


def test_they_add_like_vectors():
    one, two = Operators([PRODUCT, COPY, PRODUCT]), Operators([COPY])
    assert one + two == Operators([PRODUCT, PRODUCT, COPY, COPY])
    assert one - two == Operators([PRODUCT, PRODUCT]) == two * 0 + Operators([PRODUCT]) * 2
    assert two - one + one == two and one != two


def test_seconds_are_sums_and_never_negative():
    seconds = {PRODUCT: 0.5, COPY: 0.25}.__getitem__
    assert Operators([PRODUCT, COPY, COPY]).seconds(seconds) == 1.0
    assert (Operators() - Operators([COPY])).seconds(seconds) == Operators().seconds(seconds) == 0.0
