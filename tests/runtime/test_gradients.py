"""Sums of gradients: exact, and in one storage for parameters that fill one."""

import pytest
import torch

from alignprop_fast.runtime.gradients import GradientSums, step_gradients

SHAPES = [(3, 4), (5,), (2, 2, 3)]


def flat_parameters(dtype):
    """Parameters that fill one storage, the last in channels' order."""
    flat = torch.randn(29, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = [flat.as_strided((3, 4), (4, 1), 0), flat[12:17], flat.as_strided((2, 2, 3), (6, 1, 2), 17)]
    return [torch.nn.Parameter(view) for view in views]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
def test_sums_lie_as_their_parameters_do(dtype, static):
    parameters = flat_parameters(dtype)
    steps = [[torch.randn(shape).to(dtype) for shape in (*SHAPES, (4,))] for _ in range(3)]
    expected = [torch.stack([grad.float() for grad in grads]) for grads in zip(*steps, strict=True)]
    expected = [(first + second) + third for first, second, third in expected]
    steps[0][1], expected[1] = None, steps[1][1].float() + steps[2][1].float()  # comes later than the others
    sums = GradientSums(parameters, 4)
    for grads in steps:
        given = [None if grad is None else grad.clone() for grad in grads]
        sums.add(given, static)
        if static:
            for grad in given:
                if grad is not None:
                    grad.fill_(float("nan"))
    assert all(map(torch.equal, sums.tensors, expected)), "to the bit: the same terms in the same order"
    assert len({total.untyped_storage()._cdata for total in sums.tensors}) == 2
    places = [(total.storage_offset(), total.stride()) for total in sums.tensors[:3]]
    assert places == [(p.storage_offset(), p.stride()) for p in parameters]


def test_a_parameter_alone_in_a_large_storage_gets_no_buffer_of_its_size():
    parameters = [torch.nn.Parameter(torch.zeros(1000)[:2]), torch.nn.Parameter(torch.zeros(3))]
    sums = GradientSums(parameters, 2)
    grads = [torch.ones(2), torch.ones(3)]
    sums.add(grads)
    assert all(a is b for a, b in zip(sums.tensors, grads, strict=True)), "taken as they are"


def test_one_tensor_given_twice_is_no_shared_sum():
    x = torch.ones(2, requires_grad=True)
    y = torch.ones(2, requires_grad=True)
    sums = GradientSums([x, y], 2)
    for _ in range(2):
        sums.add(step_gradients((x + y).square().sum(), [x, y], torch.tensor(1.0)))
    assert all((total == 8).all() for total in sums.tensors)
