"""An implementation that is switched off stays off in this process, is reported once, and is on in the next process."""

import pytest
import torch

from alignprop_fast.ops import switched_off
from alignprop_fast.ops.banded_conv import NormConv, norm_conv, upsample_conv
from alignprop_fast.ops.banded_residual import banded_residual
from alignprop_fast.ops.frozen_conv2d import frozen_conv2d
from alignprop_fast.ops.group_norm_silu import backend as group_norm_backend

LAYER = NormConv(2, torch.ones(4), torch.zeros(4), 1e-5, torch.linspace(-1, 1, 144).view(4, 4, 3, 3), None)


@pytest.fixture(autouse=True)
def all_on():
    switched_off.forget()
    yield
    switched_off.forget()


def test_the_first_reason_stands_and_is_said_once(caplog):
    assert switched_off.reason("triton") is None
    switched_off.switch_off("triton", "no C compiler\nin the path")
    switched_off.switch_off("triton", "another")
    assert switched_off.reason("triton") == "no C compiler in the path"
    assert [record.getMessage() for record in caplog.records] == ["triton is switched off: no C compiler in the path"]
    assert switched_off.everything() == {"triton": "no C compiler in the path"}


def _frozen_conv2d(x):
    return frozen_conv2d(x, torch.ones(4, 4, 3, 3), padding=(1, 1))


def _norm_conv(x):
    return norm_conv(x, LAYER)


def _upsample_conv(x):
    return upsample_conv(x, LAYER.weight)


def _banded_residual(x):
    return banded_residual(x, LAYER, LAYER)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (_frozen_conv2d, "frozen_conv2d"),
        (_norm_conv, "banded_conv"),
        (_upsample_conv, "banded_conv"),
        (_banded_residual, "banded_residual"),
    ],
)
def test_the_plain_expression_takes_the_place_of_what_is_off(op, name):
    x = torch.linspace(-1, 1, 4 * 6 * 6).view(1, 4, 6, 6).requires_grad_()
    fused = op(x)
    switched_off.switch_off(name, "wrong here")
    plain = op(x)
    assert fused.grad_fn.name().startswith("_") and not plain.grad_fn.name().startswith("_")
    # Sums of 36 products of numbers of order one in fp32, in another order.
    assert torch.allclose(fused, plain, atol=1e-4)


def test_group_norm_goes_by_pytorch_where_csrc_is_off():
    x = torch.randn(1, 4, 6, 6).to(memory_format=torch.channels_last)
    switched_off.switch_off("group_norm_silu.csrc", "wrong here")
    assert group_norm_backend(x) == "aten: wrong here"
