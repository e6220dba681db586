"""Adapters with random factors, both of them: with B = 0, as PEFT starts, A gets no gradient and changes nothing."""

import torch


def draw_factors(parameters, std=0.2, seed=1):
    """Overwrite the parameters, in their order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=std, generator=generator)


def factors_of(model):
    """The parameters of all adapters in a model."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]
