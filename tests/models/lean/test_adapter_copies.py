"""Copies of adapters in the model's 16 bits: the same numbers as casts at each use, fewer operators, never stale.

Tolerance: the same products of the same numbers. A library may add them up in another order where they lie at another
address, which moves bf16 by units of its last of 8 bits; measured 0, asserted at 2 % of the largest element.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import PromptBatch
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.learning import learning_adapters_off
from alignprop_fast.runtime import step_gradients


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(tiny_sd):
    tiny_sd.unet.to(torch.bfloat16)
    for parameter in add_lora(tiny_sd, 4, 4):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return adapt(tiny_sd)


def run(model, x, cond, parameters):
    y = model.predict(x, torch.tensor(300.0), cond)
    return [y.detach(), *step_gradients(y, [x, *parameters], torch.ones_like(y))]


def inputs(model):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return x, model.encode(PromptBatch(["red cat"], None, True, (16, 16))).cast(torch.bfloat16)


def test_results_are_those_of_casts_at_each_use_without_the_casts(model):
    (x, cond), parameters = inputs(model), model.trainable()
    with Calls() as before:
        expected = run(model, x, cond, parameters)
    copies = model.adapter_copies()
    with Calls() as after, copies.in_place():
        found = run(model, x, cond, copies.stand_ins(parameters))
    for value, same in zip(found, expected, strict=True):
        assert value.dtype == same.dtype
        assert (value - same).abs().max() <= 0.02 * same.abs().max()
    fewer = before.counts["aten::_to_copy"] - after.counts["aten::_to_copy"]
    assert fewer >= 2 * len(parameters)  # at least one for each weight, and for each gradient
    # A of q, k and v, and of k and v, lie side by side: no concatenation in either pass.
    attentions = sum(type(module).__name__ == "Attention" for module in model.denoiser.modules())
    assert before.counts["aten::cat"] - after.counts["aten::cat"] == 2 * attentions


def test_copies_follow_the_weights_keep_their_place_and_leave_earlier_graphs_valid(model):
    (x, cond), parameters = inputs(model), model.trainable()
    first = model.adapter_copies()
    with first.in_place():
        y = model.predict(x, torch.tensor(300.0), cond)
    again = model.adapter_copies()  # another chain begins before the first has gone back
    assert again is first
    places = [copy.data_ptr() for copy in first.stand_ins(parameters)]
    with first.in_place():
        torch.autograd.grad(y, first.stand_ins(parameters), torch.ones_like(y))
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(2)
    copies = model.adapter_copies().stand_ins(parameters)
    assert [copy.data_ptr() for copy in copies] == places
    assert all(torch.equal(copy, p.to(torch.bfloat16)) for copy, p in zip(copies, parameters, strict=True))


def test_a_network_in_fp32_and_adapters_that_are_off_have_no_copies(model):
    (x, cond), parameters = inputs(model), model.trainable()
    copies = model.adapter_copies()
    assert copies.size_bytes == 2 * sum(p.numel() for p in parameters)
    with torch.no_grad(), copies.in_place():
        on = model.predict(x, torch.tensor(300.0), cond)
        with learning_adapters_off(model.denoiser):
            off = model.predict(x, torch.tensor(300.0), cond)
    with torch.no_grad(), learning_adapters_off(model.denoiser):
        assert torch.equal(off, model.predict(x, torch.tensor(300.0), cond))
    assert not torch.equal(on, off)
    model.denoiser.float()
    assert model.adapter_copies().size_bytes == 0
