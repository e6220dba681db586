"""Wrong values and wrong gradients are seen."""

import pytest
import torch

from benchmarks.ops.correctness import errors
from benchmarks.ops.problem import Problem, Work


class Slanted(torch.autograd.Function):
    """x^2 with a gradient that is a thousandth too large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2.002 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    ("ours", "right"),
    [
        (lambda x: x * x, True),
        (lambda x: x * x + 1e-3, False),
        (Slanted.apply, False),
        (lambda x: x * x * float("nan"), False),
    ],
    ids=["right", "wrong value", "wrong gradient", "NaN"],
)
def test_errors_of_values_and_gradients(ours, right):
    problem = Problem((torch.randn(64),), 1, {"ours": ours, "eager": lambda x: x.square()}, Work(1.0), Work(1.0))
    assert (errors(problem)[0] <= 1) == right
