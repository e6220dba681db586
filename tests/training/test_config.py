"""The options: trl's fields and defaults, and one line for every value that cannot work."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from alignprop_fast.planner import parse_budget
from alignprop_fast.training.config import AlignPropConfig

TRL_FIELDS = {
    "run_name": "",
    "seed": 0,
    "log_with": None,
    "log_image_freq": 1,
    "tracker_kwargs": {},
    "accelerator_kwargs": {},
    "project_kwargs": {},
    "tracker_project_name": "trl",
    "logdir": "logs",
    "num_epochs": 100,
    "save_freq": 1,
    "num_checkpoint_limit": 5,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "resume_from": "",
    "sample_num_steps": 50,
    "sample_eta": 1.0,
    "sample_guidance_scale": 5.0,
    "train_batch_size": 1,
    "train_use_8bit_adam": False,
    "train_learning_rate": 1e-3,
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.999,
    "train_adam_weight_decay": 1e-4,
    "train_adam_epsilon": 1e-8,
    "train_gradient_accumulation_steps": 1,
    "train_max_grad_norm": 1.0,
    "negative_prompts": None,
    "truncated_backprop_rand": True,
    "truncated_backprop_timestep": 49,
    "truncated_rand_backprop_minmax": (0, 50),
    "push_to_hub": False,
}


def test_trl_fields_come_first_with_trl_defaults():
    names = [field.name for field in fields(AlignPropConfig)]
    assert names[:33] == ["exp_name", *TRL_FIELDS]
    config = AlignPropConfig()
    assert {name: getattr(config, name) for name in TRL_FIELDS} == TRL_FIELDS


def test_experiment_is_named_after_the_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/someone/scripts/alignprop.py", "--x"])
    assert AlignPropConfig().exp_name == "alignprop"


def test_to_dict_is_flat():
    config = AlignPropConfig(tracker_kwargs={"wandb": {"entity": "me"}}, project_kwargs={"total_limit": 3})
    options = config.to_dict()
    assert options["tracker_kwargs/wandb/entity"] == "me"
    assert options["project_kwargs/total_limit"] == 3
    assert options["truncated_rand_backprop_minmax"] == (0, 50)
    assert not any(isinstance(value, dict) for value in options.values())


def test_mutable_defaults_are_not_shared():
    AlignPropConfig().tracker_kwargs["x"] = 1
    assert AlignPropConfig().tracker_kwargs == {}


def test_a_list_from_a_file_becomes_a_tuple():
    assert AlignPropConfig(truncated_rand_backprop_minmax=[0, 10]).truncated_rand_backprop_minmax == (0, 10)


@pytest.mark.parametrize(
    "name, value",
    [
        ("train_batch_size", 0),
        ("train_batch_size", 1.5),
        ("num_epochs", 0),
        ("save_freq", 0),
        ("log_image_freq", 0),
        ("train_gradient_accumulation_steps", -1),
        ("lora_rank", 0),
        ("max_bad_steps", 0),
        ("sample_num_steps", 0),
        ("train_learning_rate", -1e-3),
        ("train_learning_rate", float("nan")),
        ("train_max_grad_norm", 0.0),
        ("train_adam_beta1", 1.0),
        ("train_adam_weight_decay", -1.0),
        ("optimizer", "sgdd"),
        ("lr_scheduler", "cosinus"),
        ("warmup_steps", -1),
        ("warmup_steps", 100),
        ("ema_decay", 1.0),
        ("ema_decay", float("nan")),
        ("base_dtype", "fp4"),
        ("adapter_dtype", "fp16"),
        ("mixed_precision", "fp8"),
        ("log_with", "paper"),
        ("sample_eta", 1.5),
        ("guidance_rescale", -0.1),
        ("height", 0),
        ("memory_budget", "much"),
        ("memory_budget", 0),
        ("host_memory", "much"),
        ("truncated_rand_backprop_minmax", (9, 3)),
    ],
)
def test_impossible_values_are_refused_in_one_line(name, value):
    with pytest.raises(ValueError) as error:
        AlignPropConfig(**{name: value})
    message = str(error.value)
    assert "\n" not in message and str(value) in message
    assert name in message


def test_truncation_without_any_gradient_is_refused():
    with pytest.raises(ValueError, match="use at most 9"):
        AlignPropConfig(sample_num_steps=10, truncated_backprop_rand=False, truncated_backprop_timestep=10)
    with pytest.raises(ValueError, match="at most 9"):
        AlignPropConfig(sample_num_steps=10, truncated_rand_backprop_minmax=(10, 50))
    AlignPropConfig(sample_num_steps=10, truncated_backprop_rand=False, truncated_backprop_timestep=9)
    # trl's defaults draw from 0..50 for every number of steps, so a step rarely has gradient, but some can
    AlignPropConfig(sample_num_steps=10)


def test_an_optimizer_without_its_library_names_the_remedy(monkeypatch):
    monkeypatch.setattr("alignprop_fast.training.config.find_spec", lambda name: None)
    for options in ({"train_use_8bit_adam": True}, {"optimizer": "AdamW8bit"}, {"optimizer": "lion8bit"}):
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            AlignPropConfig(**options).check_packages()
    with pytest.raises(ValueError, match="prodigy needs prodigyopt: pip install prodigyopt"):
        AlignPropConfig(optimizer="Prodigy").check_packages()
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install bitsandbytes, or use fp8 or int8"):
        AlignPropConfig(base_dtype="nf4").check_packages()
    AlignPropConfig(optimizer="AdamW").check_packages()


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("mixed_precision: no", "mixed_precision is False: use a text (in YAML, texts such as no"),
        ("log_with: no", "log_with is False"),
        ("optimizer: on", "optimizer is True"),
        ("truncation: off", "truncation is False"),
        ("negative_prompts: no", "negative_prompts is False: use a text or None"),
        ("negative_prompts: 12", "stand in quotes"),
        ("exp_name: 2024-01-01", "stand in quotes"),
        ("output_dir: 010", "output_dir is 8"),
        ("train_learning_rate: 1e-4", "use a number (in YAML, 1e-4 is a text and 1.0e-4 a number)"),
        ("sample_eta: yes", "sample_eta is True: use a number"),
        ("allow_tf32: 'no'", "allow_tf32 is 'no': use True or False"),
        ("truncated_backprop_rand: 1", "use True or False"),
        ("num_epochs: yes", "num_epochs is True: use a whole number"),
        ("seed: 1.5", "seed is 1.5: use a whole number"),
        ("lora_rank: '4'", "lora_rank is '4': use a whole number"),
        ("height: 1.0e+2", "height is 100.0: use a whole number or None"),
        ("memory_budget: no", "memory_budget False is not a size"),
        ("tracker_kwargs: []", "use a dictionary"),
        ("truncated_rand_backprop_minmax: [0, 2.5]", "use two whole numbers"),
        ("truncated_rand_backprop_minmax: 5", "use two whole numbers"),
    ],
)
def test_what_yaml_makes_of_a_value_is_refused_by_name(written, words):
    """As scripts do it: AlignPropConfig(**yaml.safe_load(file))."""
    with pytest.raises(ValueError) as error:
        AlignPropConfig(**yaml.safe_load(written))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_values_of_other_types_that_mean_the_same_are_taken(tmp_path):
    options = {"output_dir": tmp_path, "logdir": tmp_path, "resume_from": None, "memory_budget": 24e9}
    numbers = {
        "seed": np.int64(3),
        "train_learning_rate": np.float32(1e-3),
        "lora_alpha": 8,
        "train_batch_size": np.int32(2),
    }
    config = AlignPropConfig(**options, **numbers)
    assert (config.seed, config.train_batch_size, config.lora_alpha) == (3, 2, 8)


def test_paths_and_numpy_numbers_become_what_json_knows():
    """Checkpoints and trackers keep the options."""
    numbers = {"seed": np.int64(3), "train_learning_rate": np.float32(0.5), "memory_budget": np.int64(2**30)}
    numbers |= {"allow_tf32": np.bool_(False), "truncated_rand_backprop_minmax": [np.int64(0), np.int64(4)]}
    config = AlignPropConfig(output_dir=Path("x"), logdir=Path("y"), resume_from=Path("z"), **numbers)
    expected = {"output_dir": "x", "logdir": "y", "resume_from": "z", "seed": 3, "train_learning_rate": 0.5}
    expected |= {"memory_budget": 2**30, "allow_tf32": False, "truncated_rand_backprop_minmax": [0, 4]}
    for options in (asdict(config), config.to_dict()):
        assert json.loads(json.dumps(options)).items() >= expected.items()


def test_scripts_can_read_it_from_their_command_line():
    """As trl's examples do."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(AlignPropConfig)
    (config,) = parser.parse_args_into_dataclasses(["--lora_rank", "8", "--num_epochs", "3", "--memory_budget", "4GiB"])
    assert (config.lora_rank, config.num_epochs) == (8, 3) and parse_budget(config.memory_budget) == 4 * 2**30
    assert "Rank of the LoRA adapters" in parser.format_help()


def test_help_lists_every_field():
    text = AlignPropConfig.__doc__
    assert all(re.search(rf"\b{field.name}\b", text) for field in fields(AlignPropConfig))
