"""The moving average equals that of a plain loop, replaces the weights inside a block, and resumes exactly."""

import io

import pytest
import torch

from alignprop_fast.planner.optimizer_state import average_bytes
from alignprop_fast.training.averaged_weights import AveragedWeights
from alignprop_fast.training.flat_parameters import FlatParameters

SHAPES = [(4, 320), (320, 4), (77,)]
DECAY = 0.7


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def move(tensors, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in tensors:
            tensor += torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", [True, False])
def test_it_is_the_average_of_a_plain_loop(dtype, merge):
    """Tolerance: fp32 rounds each of six updates of numbers up to about 10 by at most 2e-6."""
    tensors = FlatParameters(parameters(dtype), merge).tensors
    average = AveragedWeights(tensors, DECAY)
    expected = [tensor.detach().double() for tensor in tensors]
    for n in range(6):
        move(tensors, n)
        average.update()
        decay = 0.0 if n == 0 else min(DECAY, (1 + n) / (10 + n))
        expected = [decay * old + (1 - decay) * new.double() for old, new in zip(expected, tensors, strict=True)]
    found = average.state_dict()["weights"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.detach(), rtol=0, atol=2e-5)
    assert sum(tensor.nbytes for tensor in found) == average_bytes(SHAPES)


def test_changes_that_bf16_would_lose_add_up():
    [tensor] = [torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    average = AveragedWeights([tensor], 0.999)
    average.load_state_dict({"updates": 10**6, "weights": [torch.ones(5)]})
    with torch.no_grad():
        tensor.fill_(1.0078125)  # the next number after 1; a thousandth of the difference is no bf16 step
    for _ in range(1000):
        average.update()
    # 1 - 0.999^1000 of the way there; fp32 rounds each of 1000 updates by up to 6e-8.
    torch.testing.assert_close(
        average.state_dict()["weights"][0], torch.full((5,), 1 + 0.0078125 * (1 - 0.999**1000)), rtol=0, atol=6e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_its_place_modules_see_the_average_and_then_their_own_bits(dtype):
    views = parameters(dtype)
    tensors = FlatParameters(views).tensors
    average = AveragedWeights(tensors, DECAY)
    move(tensors, 0)
    own = [view.detach().clone() for view in views]
    average.load_state_dict({"updates": 3, "weights": [torch.full_like(t, 0.5, dtype=torch.float32) for t in tensors]})
    with pytest.raises(KeyError), average.in_place():
        assert all((view == 0.5).all() for view in views)
        raise KeyError
    assert all(torch.equal(view, value) for view, value in zip(views, own, strict=True))


def test_a_block_inside_another_changes_nothing():
    [tensor] = tensors = [torch.nn.Parameter(torch.ones(5))]
    average = AveragedWeights(tensors, DECAY)
    average.load_state_dict({"updates": 3, "weights": [torch.full((5,), 0.5)]})
    with average.in_place():
        with average.in_place():
            assert (tensor == 0.5).all()
        assert (tensor == 0.5).all()
    assert (tensor == 1).all()


def test_a_loaded_state_goes_on_with_the_same_bits():
    tensors = parameters(torch.float32)
    average = AveragedWeights(tensors, 0.9)
    for step in range(3):
        move(tensors, step)
        average.update()
    stream = io.BytesIO()
    torch.save(average.state_dict(), stream)
    stream.seek(0)
    other = AveragedWeights(tensors, 0.9)
    other.load_state_dict(torch.load(stream, weights_only=True))
    move(tensors, 3)
    for one in (average, other):
        one.update()
    assert all(map(torch.equal, average.state_dict()["weights"], other.state_dict()["weights"]))
    other.restart()
    assert other.state_dict()["updates"] == 0 and torch.equal(other.state_dict()["weights"][0], tensors[0])
