"""Adapters during a chain, on a small network with a frozen adapter (a style) and one that learns (a reward)."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from alignprop_fast.models.lora.adapters import learns
from alignprop_fast.models.lora.learning import (
    adapter_settings,
    check_learning,
    has_learning_adapters,
    learning_adapters_off,
)

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters are what is tested


def with_adapters(*names, **options):
    network = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    for name in names:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"], **options), network, name)
    for layer in (network[0], network[2]):
        if names:
            layer.set_adapter(list(names))
    return network


@pytest.fixture
def network():
    network = with_adapters("style", "reward", init_lora_weights=False)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".reward." in name)
    return network


def test_only_the_adapter_that_learns_goes_off_and_comes_back_as_it_was(network):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    both = network(x)
    for layer in (network[0], network[2]):
        layer._active_adapter = ["style"]
    style = network(x)
    for layer in (network[0], network[2]):
        layer._active_adapter = ["style", "reward"]
    with pytest.raises(KeyError), learning_adapters_off(network):
        assert torch.equal(network(x), style)
        raise KeyError  # the adapters come back after an error, too
    assert torch.equal(network(x), both) and not torch.equal(both, style)
    assert learns(network[0], "reward") and not learns(network[0], "style")


def test_adapters_learn_if_they_are_active_and_require_grad(network):
    assert has_learning_adapters(network)
    with learning_adapters_off(network):
        assert not has_learning_adapters(network)
    network.requires_grad_(False)
    assert not has_learning_adapters(network) and not has_learning_adapters(with_adapters())


def test_settings_differ_when_an_adapter_is_off_scaled_or_merged(network):
    found = [adapter_settings(network)]
    with learning_adapters_off(network):
        found.append(adapter_settings(network))
    assert adapter_settings(network) == found[0]
    network[0].set_scale("style", 0.5)
    found.append(adapter_settings(network))
    network[2].enable_adapters(False)
    found.append(adapter_settings(network))
    network[0].merge(adapter_names=["style"])
    found.append(adapter_settings(network))
    assert len(set(found)) == 5


def test_dropout_is_refused_while_it_is_active():
    network = with_adapters("default", lora_dropout=0.1)
    with pytest.raises(ValueError, match="lora_dropout"):
        check_learning(network.train())
    check_learning(network.eval())
