"""What one check accepts and what it names: twice the error of the plain expression plus 1e-6, no more."""

import dataclasses

import pytest
import torch

from alignprop_fast.doctor.checking import Case, DeviceLost, Draw, autograd_of, check, failed
from alignprop_fast.doctor.report import Check
from alignprop_fast.ops import switched_off

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_off():
    switched_off.forget()
    yield
    switched_off.forget()
    torch.use_deterministic_algorithms(False)


def squared(x):
    return x * x


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2.01 * ctx.saved_tensors[0] * g


def case(fn, dtype=torch.float32, off="squared.kernel"):
    x = Draw(dtype, CPU)(5, 7)
    return Case("squared", "5x7", dtype, "kernel", (x,), 1, autograd_of(fn, 1), squared, off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right(dtype):
    row = check(case(lambda x: x.square(), dtype))
    assert row.fault is None and row.deterministic and row.error is not None and row.error_over_bound <= 1
    assert not switched_off.everything()


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda x: x * x + 1e-4, "in output 0"),
        (WrongGradient.apply, "in gradient 0"),
        (lambda x: x * x / (x > 0), "infinity in output 0"),
        (lambda x: (x * x)[:4], "Mismatch in shape"),
        (lambda x: (x * x).double(), "output 0 is float64"),
        (lambda x: x @ x, "RuntimeError"),
    ],
)
def test_wrong(fn, says):
    row = check(case(fn))
    assert row.fault is not None and says in row.fault and row.off == "squared.kernel"
    assert says in switched_off.everything()["squared.kernel"]


def test_what_cannot_be_switched_off_stays_a_fault():
    row = check(case(WrongGradient.apply, off=None))
    assert row.fault is not None and row.off is None and not switched_off.everything()


def test_two_runs_that_differ_matter_where_determinism_is_asked_for():
    runs = iter(range(10**6))

    def drifting(x):
        return x * x + 1e-7 * (next(runs) % 2)

    row = check(case(drifting))
    assert row.deterministic is False and row.fault is None
    torch.use_deterministic_algorithms(True)
    row = check(case(drifting))
    assert row.off == "squared.kernel" and "two runs differ" in row.fault


def test_a_full_device_is_no_fault():
    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = check(case(full))
    assert row.fault is None and "memory is full" in row.note and not switched_off.everything()


def test_a_reference_that_raises_is_not_the_implementation_s_fault():
    row = check(dataclasses.replace(case(squared), reference=lambda x: x @ x))
    assert row.implementation == "plain PyTorch" and row.fault and row.off is None and not switched_off.everything()


def test_a_device_that_answers_no_more_ends_the_examination_and_the_culprit_is_off():
    with pytest.raises(DeviceLost, match="illegal"):
        # There is no such device here, which is as good as lost.
        failed(Check("op", "kernel", "", ""), RuntimeError("illegal access"), torch.device("cuda", 99), "op.kernel")
    assert "illegal access" in switched_off.everything()["op.kernel"]
