"""A remembered result equals the operator's: the same layouts, in new storages. Views are run each time."""

import math

import pytest
import torch

from alignprop_fast.runtime import meta_results, remembered_results
from alignprop_fast.runtime.meta_results import meta_result, tensors_in

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def remembering():
    with remembered_results():
        yield


class Counted:
    """An operator that counts its runs."""

    def __init__(self, func):
        self.func, self._schema, self.tags, self.runs = func, func._schema, func.tags, 0

    def __call__(self, *args, **kwargs):
        self.runs += 1
        return self.func(*args, **kwargs)


def meta(*size, dtype=torch.float32):
    return torch.empty(*size, dtype=dtype, device="meta")


def layout(result):
    results = result if isinstance(result, tuple | list) else [result]
    return type(result), [t if t is None else (t.shape, t.stride(), t.dtype, len(t.untyped_storage())) for t in results]


def run(func, args):
    return meta_result(func, args, {})[0]


NEW = {
    "in another order": (aten.add.Tensor, lambda: (meta(2, 3).t(), meta(3, 2).t().t())),
    "a list": (aten.cat.default, lambda: ([meta(2, 3), meta(1, 3)],)),
    "a tuple": (aten.native_layer_norm.default, lambda: (meta(2, 3), [3], None, None, 1e-5)),
    "one of three gradients": (
        aten.convolution_backward.default,
        lambda: (
            *(meta(1, 2, 4, 4), meta(1, 3, 4, 4), meta(2, 3, 1, 1), [0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
            [True, False, False],
        ),
    ),
}


@pytest.mark.parametrize("name", NEW)
def test_new_tensors_are_made_without_another_run(name):
    func, arguments = NEW[name]
    counted, args = Counted(func), arguments()
    expected = layout(func(*args))
    assert layout(run(counted, args)) == expected and layout(run(counted, arguments())) == expected
    assert counted.runs == 1
    tensors = tensors_in(args, run(counted, args), run(counted, args))
    assert len({t.untyped_storage()._cdata for t in tensors}) == len(tensors)


def test_other_shapes_strides_dtypes_and_numbers_are_run():
    counted = Counted(aten.mul.Tensor)
    whole = meta(2, 3, dtype=torch.int64)
    calls = [(whole, 1), (whole, 1.0), (whole, True), (meta(2, 3), 1), (meta(3, 2), 1), (meta(3, 2).t(), 1)]
    for args in calls * 2:
        assert layout(run(counted, args)) == layout(aten.mul.Tensor(*args))
    assert counted.runs == len(calls)


def test_an_argument_that_is_changed_is_returned():
    counted = Counted(aten.add_.Tensor)
    for _ in range(2):
        x = meta(3)
        assert run(counted, (x, meta(3))) is x
    assert counted.runs == 1


@pytest.mark.parametrize("func", [aten.t.default, aten.t_.default, aten.alias.default])
def test_views_and_changes_of_a_layout_are_run_each_time(func):
    counted = Counted(func)
    for _ in range(2):
        x = meta(2, 3)
        y = run(counted, (x,))
        assert y.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert func is aten.alias.default or y.shape == (3, 2)
    assert counted.runs == 2


def test_a_storage_is_exchanged_each_time():
    counted = Counted(aten.set_.source_Tensor)
    for _ in range(2):
        x, y = meta(3), meta(3)
        assert run(counted, (x, y)) is x and x.untyped_storage()._cdata == y.untyped_storage()._cdata
    assert counted.runs == 2


def test_the_default_dtype_is_todays():
    before, dtypes = torch.get_default_dtype(), (torch.float32, torch.float64)
    try:
        for dtype in dtypes:
            torch.set_default_dtype(dtype)
            assert run(aten.mul.Tensor, (meta(3, dtype=torch.int64), 0.5)).dtype == dtype
    finally:
        torch.set_default_dtype(before)


def test_nan_is_one_number():
    counted = Counted(aten.mul.Tensor)
    for _ in range(3):
        run(counted, (meta(3), float("nan")))
    run(counted, (meta(3), math.inf))
    assert counted.runs == 2


def test_nothing_is_remembered_outside_or_from_one_time_to_the_next():
    counted = Counted(aten.neg.default)
    for _ in range(2):
        with remembered_results():
            run(counted, (meta(3),))
            run(counted, (meta(3),))
        run(counted, (meta(3),))
    assert counted.runs == 4 and meta_results._known is None
