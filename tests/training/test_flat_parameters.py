"""One flat parameter: names, files and gradients do not change, and the optimizer's step reaches every adapter."""

import copy

import pytest
import torch
from peft import LoraConfig

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.load_save import load_lora, save_lora
from alignprop_fast.training.flat_parameters import FlatParameters
from alignprop_fast.training.optimizers import make_optimizer


def adapters(pipe):
    return [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]


def test_parameters_are_the_same_objects_with_the_same_values(tiny_sd):
    before = add_lora(tiny_sd, rank=4)
    names = [name for name, parameter in tiny_sd.unet.named_parameters() if parameter.requires_grad]
    values = copy.deepcopy(before)
    flat = FlatParameters(before)
    assert [name for name, parameter in tiny_sd.unet.named_parameters() if parameter.requires_grad] == names
    assert all(a is b for a, b in zip(adapters(tiny_sd), before, strict=True))
    assert all(torch.equal(a, b) and a.is_leaf for a, b in zip(before, values, strict=True))
    assert len(flat.tensors) == 1 and flat.tensors[0].numel() == sum(parameter.numel() for parameter in before)
    with torch.no_grad():
        flat.tensors[0].fill_(3)
    assert all((parameter == 3).all() for parameter in before)


def test_a_step_equals_that_of_separate_parameters(tiny_sd):
    """AdamW treats each element alike, so merged tensors give the same bits as separate ones."""
    mine = add_lora(tiny_sd, rank=4)
    theirs = copy.deepcopy(mine)
    flat = FlatParameters(mine)
    optimizers = [make_optimizer("adamw", parameters, learning_rate=0.1) for parameters in (flat.tensors, theirs)]
    for _ in range(3):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        flat.join_gradients()
        assert all(a.grad.untyped_storage()._cdata == flat.tensors[0].grad.untyped_storage()._cdata for a in mine)
        for optimizer in optimizers:
            optimizer.step()
        flat.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_strides_and_dtypes_are_kept():
    tensors = [
        torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(5, 3, dtype=torch.bfloat16),
        torch.randn(6),
    ]
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    flat = FlatParameters(parameters)
    assert [tensor.dtype for tensor in flat.tensors] == [torch.float32, torch.bfloat16]
    assert parameters[0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(parameters, tensors, strict=True))
    parameters[0].grad, parameters[1].grad = torch.randn(4, 8, 3, 3), torch.ones(5, 3)
    wanted = parameters[0].detach() - 0.1 * parameters[0].grad
    flat.join_gradients()
    torch.optim.SGD(flat.tensors, lr=0.1).step()
    torch.testing.assert_close(parameters[0].detach(), wanted)
    assert torch.equal(parameters[2], tensors[2]), "no gradient counts as zero"


class Wide(torch.autograd.Function):
    """A chain's gradient of bf16 parameters, a sum in fp32."""

    @staticmethod
    def forward(ctx, parameter, grad):
        ctx.save_for_backward(grad)
        return parameter.float().sum()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


@pytest.mark.parametrize("merge", [True, False])
def test_micro_batches_add_up_in_fp32(merge):
    """A bf16 sum of 16 gradients of one sign loses up to 16 roundings of 1/512; here only fp32 rounds."""
    generator = torch.Generator().manual_seed(0)
    grads = [1 + torch.rand(4096, generator=generator) for _ in range(16)]
    parameters = [torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16)) for _ in range(2)]
    flat = FlatParameters(parameters, merge)
    narrow = torch.zeros(4096, dtype=torch.bfloat16)
    for grad in grads:
        Wide.apply(parameters[0], grad).backward()
        narrow += grad.bfloat16()
    flat.join_gradients()
    exact = torch.stack(grads).double().sum(0)
    assert flat.tensors[0].grad.dtype == torch.float32 and flat.tensors[0].dtype == torch.bfloat16
    torch.testing.assert_close(flat.tensors[0].grad[:4096].double(), exact, rtol=16 * 2**-24, atol=0)
    assert ((narrow.double() - exact) / exact).abs().max() > 3 * 2**-9
    assert flat.tensors[0].grad[4096:].count_nonzero() == 0 and (merge or flat.tensors[1].grad is None)
    flat.zero_grad()
    assert all(tensor.grad is None for tensor in (*parameters, *flat.tensors))


def test_micro_batches_of_a_chain_in_bf16(tiny_sd):
    """Two backward passes through the chain give the sum of the fp32 gradients of each."""
    tiny_sd.to(torch.bfloat16)
    parameters = add_lora(tiny_sd, rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.1).to(torch.bfloat16)
    flat = FlatParameters(parameters)
    sampler = DifferentiableSampler(tiny_sd, num_inference_steps=2)

    def backward(seed):
        images = sampler(["a dog"], generator=torch.Generator().manual_seed(seed), grad_steps=[0, 1])
        (images.float() * torch.linspace(0, 1, images.shape[-1])).mean().backward()

    exact = 0.0
    for seed in range(2):
        backward(seed)
        place = parameters[0].grad.data_ptr()
        flat.join_gradients()
        one = flat.tensors[0].grad
        assert one.data_ptr() == place and parameters[0].grad.data_ptr() == place, "the chain's sum, not a copy"
        assert (one != one.bfloat16()).any(), "the chain's sum over its two steps is not rounded"
        exact = exact + one.double()
        flat.zero_grad()
    for seed in range(2):
        backward(seed)
    flat.join_gradients()
    found = flat.tensors[0].grad
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


def test_files_are_read_into_the_flat_parameter(tiny_sd, tmp_path):
    parameters = add_lora(tiny_sd, rank=2)
    flat = FlatParameters(parameters)
    with torch.no_grad():
        flat.tensors[0].normal_()
    save_lora(tiny_sd, tmp_path)
    saved = flat.tensors[0].detach().clone()
    with torch.no_grad():
        flat.tensors[0].zero_()
    load_lora(tiny_sd, tmp_path)
    assert torch.equal(flat.tensors[0], saved)


def test_peft_itself_loads_into_it(tiny_sd):
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    flat = FlatParameters(add_lora(tiny_sd, rank=2))
    state = {key: torch.randn_like(tensor) for key, tensor in get_peft_model_state_dict(tiny_sd.unet).items()}
    set_peft_model_state_dict(tiny_sd.unet, state)
    found = get_peft_model_state_dict(tiny_sd.unet)
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert flat.tensors[0].double().sum().item() == pytest.approx(sum(t.double().sum().item() for t in state.values()))


def test_adapters_that_were_moved_are_noticed(tiny_sd):
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    flat = FlatParameters(adapters(tiny_sd))
    tiny_sd.unet.to(torch.float64)
    with pytest.raises(ValueError, match="moved or cast after the trainer was made"):
        flat.join_gradients()
