"""The adapters of a denoiser during a chain: which ones learn, switched off, and compared with earlier settings."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignprop_fast.models.lora.adapters import learns


def check_learning(network: nn.Module) -> None:
    """Refuse what a chain cannot repeat or does not compute.

    Raises:
        ValueError: dropout is active, so that a replayed step would differ from the first run; or DoRA is used.
    """
    if any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in network.modules()):
        raise ValueError("dropout is on in the denoiser: set lora_dropout to 0, or call its eval()")
    if any(getattr(config, "use_dora", False) for config in getattr(network, "peft_config", {}).values()):
        raise ValueError("DoRA adapters are not supported: make the LoraConfig with use_dora=False")


def has_learning_adapters(network: nn.Module) -> bool:
    """Whether the network has active PEFT adapters that require grad."""
    return any(learns(layer, name) for layer in _layers(network) for name in layer.active_adapters)


@contextmanager
def learning_adapters_off(network: nn.Module) -> Iterator[None]:
    """Inside the `with` block the adapters that learn are off, so the network is the base model.

    Frozen adapters stay on, for example a style that is used while another adapter is trained.
    """
    layers = _layers(network)
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            # Set only the names, because `set_adapter` also changes requires_grad, which a running chain relies on.
            layer._active_adapter = [name for name in layer.active_adapters if not learns(layer, name)]
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def adapter_settings(network: nn.Module) -> Hashable:
    """Which adapters are on or merged into the weights, and their strengths; to compare."""
    return tuple(
        (m.disable_adapters, *m.active_adapters, *m.merged_adapters, *getattr(m, "scaling", {}).values())
        for m in _layers(network)
    )


def _layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
