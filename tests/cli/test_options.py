"""Options of the command line reach the trainer."""

from dataclasses import fields, replace

import pytest

from alignprop_fast.cli.options import make_config
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.declaration import Command, values
from alignprop_fast.training.options import TrainOptions

DEFAULTS = TrainOptions()

SHARED = sorted(values(TrainOptions(), Command.TRAIN).keys() & {field.name for field in fields(AlignPropConfig)})
OTHER = {
    "adapter_dtype": "bf16",
    "base_dtype": "int8",
    "ema_decay": 0.5,
    "host_memory": 3 * 2**30,
    "log_with": "tensorboard",
    "lora_targets": "all",
    "lr_scheduler": "cosine",
    "memory_budget": 9 * 2**30,
    "mixed_precision": "bf16",
    "optimizer": "adafactor",
    "truncation": "full",
}


@pytest.mark.parametrize("name", [name for name in SHARED if name not in ("output_dir", "lora_alpha")])
def test_an_option_of_the_same_name_is_passed_on(name):
    plain = replace(DEFAULTS, lora_alpha=4.0, mixed_precision="no")
    default = getattr(DEFAULTS, name)
    value = OTHER.get(name) or (not default if isinstance(default, bool) else 16 + (default or 0))
    assert getattr(make_config(replace(plain, **{name: value}), "cpu", ""), name) == value


def test_sizes_become_bytes_at_the_door():
    plain = replace(DEFAULTS, lora_alpha=4.0, mixed_precision="no")
    config = make_config(replace(plain, memory_budget="9GiB", host_memory="3 GiB"), "cpu", "")
    assert (config.memory_budget, config.host_memory) == (9 * 2**30, 3 * 2**30)
    words = [make_config(replace(plain, memory_budget=word), "cpu", "") for word in ("none", "auto")]
    assert [config.memory_budget for config in words] == [None, "auto"]
