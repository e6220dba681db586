"""The choice between the LoRA kernels and plain products on the emulated GPU: wrong kernels do not win."""

from functools import partial

import pytest
import torch

from alignprop_fast.ops import autotune, lora_linear_trials, switched_off
from alignprop_fast.ops.lora_linear_plain import Layer


@pytest.fixture(autouse=True)
def kernels_are_fastest(emulated, monkeypatch):
    monkeypatch.setattr(autotune, "REPETITIONS", 1)

    def told(problem, name, candidate, device, measure=autotune._milliseconds):
        result = measure(problem, name, candidate, device)
        return float(name == "plain") if isinstance(result, float) else result

    monkeypatch.setattr(autotune, "_milliseconds", told)
    monkeypatch.setattr(autotune, "_save", lambda *arguments: None)
    autotune.forget()
    yield
    autotune.forget()
    switched_off.forget()


def problem():
    """x [2, 9, 32] and two layers with new adapters, whose `up` is zero."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)

    return random(2, 9, 32), [Layer(random(o, 32), None, random(4, 32), 0 * random(o, 4)) for o in (16, 32)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_kernels_are_taken_where_they_are_right(direction):
    assert lora_linear_trials._fastest(direction, *problem()) == "triton"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_without_the_adapters_do_not_win(direction, monkeypatch):
    def without(layers):
        return [layer._replace(up=0 * layer.up) for layer in layers]

    def wrong(prepare, x, layers):
        run = prepare(x, layers)
        return lambda x, layers: run(x, without(layers))

    forwards, backward = dict(lora_linear_trials.FORWARDS), lora_linear_trials.run_backward
    for name, prepare in forwards.items():
        monkeypatch.setitem(lora_linear_trials.FORWARDS, name, partial(wrong, prepare))

    def wrong_back(gs, x, layers, wants_dx):
        return backward(gs, x, without(layers), wants_dx)

    monkeypatch.setattr(lora_linear_trials, "run_backward", wrong_back)
    x, layers = problem()
    assert lora_linear_trials._fastest(direction, x, layers) == "plain"
    told = autotune.explain(str(lora_linear_trials.problem(direction, x, layers)), x.device)
    assert "triton: errors are" in told
