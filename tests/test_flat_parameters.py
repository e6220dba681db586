"""One flat parameter: names, files and gradients are as they were, and the optimizer's step reaches every adapter."""

import copy

import pytest
import torch
from peft import LoraConfig

from alignprop_fast.flat_parameters import FlatParameters
from alignprop_fast.models.lora import add_lora, load_lora, save_lora
from alignprop_fast.optim import make_optimizer


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
    """AdamW treats each element alike: the same bits, whether tensors are laid together or not."""
    mine = add_lora(tiny_sd, rank=4)
    theirs = copy.deepcopy(mine)
    flat = FlatParameters(mine)
    optimizers = [make_optimizer("adamw", parameters, learning_rate=0.1) for parameters in (flat.tensors, theirs)]
    for _ in range(3):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        flat.gather_gradients()
        assert all(parameter.grad is None for parameter in mine)
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
    parameters[0].grad, parameters[1].grad = torch.randn(4, 8, 3, 3), torch.ones(5, 3, dtype=torch.bfloat16)
    wanted = parameters[0].detach() - 0.1 * parameters[0].grad
    flat.gather_gradients()
    torch.optim.SGD(flat.tensors, lr=0.1).step()
    torch.testing.assert_close(parameters[0].detach(), wanted)
    assert torch.equal(parameters[2], tensors[2]), "no gradient counts as zero"


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
        flat.gather_gradients()
