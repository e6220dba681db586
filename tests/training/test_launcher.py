"""Settings of accelerate in the environment are refused, or followed or overridden with a printed line."""

import random

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from accelerate.utils.environment import get_cpu_distributed_information

from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.launcher import (
    COUNT,
    INDEX,
    checked_arguments,
    drop_empty_places,
    first_number,
    read_launcher,
)
from alignprop_fast.training.placement import checkpoint_root, make_accelerator
from alignprop_fast.training.trainer import AlignPropTrainer


def score(images_BCHW, prompts, metadata):
    return images_BCHW.mean(dim=(1, 2, 3)), {}


def gradient(folder, output_dir, reward=score, micro_batches=1):
    """The gradient that the optimizer gets in the first step."""
    config = AlignPropConfig(
        mixed_precision="no",
        sample_num_steps=2,
        truncation="full",
        save_freq=1000,
        train_gradient_accumulation_steps=micro_batches,
        output_dir=str(output_dir),
        accelerator_kwargs={"cpu": True},
    )
    trainer = AlignPropTrainer(config, reward, lambda: ("a cat", {}), DefaultDDPOStableDiffusionPipeline(str(folder)))
    seen = []
    trainer.optimizer.step = lambda: seen.append(torch.cat([t.grad.flatten() for t in trainer.update.weights.tensors]))
    random.seed(0)
    trainer.step(0, 0)
    return seen[0]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradient_accumulation_is_the_options(
    monkeypatch, fresh_process, caplog, tiny_sd_folder, tmp_path, micro_batches
):
    expected = gradient(tiny_sd_folder, tmp_path, micro_batches=micro_batches)
    assert expected.abs().max() > 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = gradient(tiny_sd_folder, tmp_path, micro_batches=micro_batches)
    assert torch.equal(found, expected)
    (line,) = [record.getMessage() for record in caplog.records if "ACCELERATE" in record.getMessage()]
    assert line.startswith(f"gradient accumulation steps {micro_batches}: the option holds")


def test_an_accelerator_of_somebody_else_changes_no_gradient(fresh_process, tiny_sd_folder, tmp_path):
    """accelerate keeps one number of accumulation steps for all Accelerators of a process."""

    def with_an_accelerator(images_BCHW, prompts, metadata):
        Accelerator(gradient_accumulation_steps=3, cpu=True)
        return score(images_BCHW, prompts, metadata)

    expected = gradient(tiny_sd_folder, tmp_path)
    assert torch.equal(gradient(tiny_sd_folder, tmp_path, with_an_accelerator), expected)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP (ACCELERATE_USE_FSDP=true)"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "tensor, context or sequence parallelism"),
        ("ACCELERATE_USE_TP", "True", "tensor parallelism"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "torch.compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "use no, bf16 or fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "no whole number"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0", "no whole number"),
        ("ACCELERATE_USE_CPU", "perhaps", "neither true nor false"),
        ("ACCELERATE_DEBUG_MODE", "", "neither true nor false"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(name, value, said):
    with pytest.raises(ValueError) as error:
        read_launcher({name: value})
    assert said in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_what_accelerate_launch_sets_of_itself_is_no_wish():
    launcher = read_launcher(
        {
            "ACCELERATE_USE_CPU": "False",
            "ACCELERATE_MIXED_PRECISION": "no",
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_DYNAMO_MODE": "default",
            "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        }
    )
    assert launcher.choose_device("auto") == ("auto", "") and launcher.compare_accumulation(3) == ""
    assert launcher.choose_precision("auto", "bf16") == ("bf16", "") == launcher.choose_precision("bf16", "no")


def test_device_and_precision_follow_where_the_option_leaves_them_open():
    cpu = read_launcher({"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert cpu.choose_device("auto") == ("cpu", "device cpu, as ACCELERATE_USE_CPU says")
    assert cpu.choose_device("cpu") == ("cpu", "")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU asks for the device cpu, and the options for cuda"):
        cpu.choose_device("cuda")
    assert cpu.choose_precision("auto", "no") == ("bf16", "mixed precision bf16, as ACCELERATE_MIXED_PRECISION says")
    chosen, line = cpu.choose_precision("no", "no")
    assert chosen == "no" and "the option holds, not ACCELERATE_MIXED_PRECISION=bf16" in line
    second = read_launcher({"ACCELERATE_TORCH_DEVICE": "cuda:1"})
    assert second.choose_device("auto")[0] == second.choose_device("cuda")[0] == "cuda:1"
    for other in ("cpu", "cuda:0"):
        with pytest.raises(ValueError, match="ACCELERATE_TORCH_DEVICE"):
            second.choose_device(other)
    with pytest.raises(ValueError, match="contradict"):
        read_launcher({"ACCELERATE_USE_CPU": "1", "ACCELERATE_TORCH_DEVICE": "cuda"})


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("gradient_accumulation_plugin", GradientAccumulationPlugin(num_steps=4), "train_gradient_accumulation_steps"),
        ("mixed_precision", "bf16", "mixed_precision"),
        ("dynamo_backend", "inductor", "compiled"),
        ("dynamo_plugin", TorchDynamoPlugin(backend="inductor"), "compiled"),
        ("fsdp_plugin", object(), "leave it out"),
        ("parallelism_config", object(), "leave it out"),
        ("cpuu", True, "leave it out"),
    ],
)
def test_arguments_of_accelerate_that_the_config_has_fields_for(name, value, field):
    with pytest.raises(ValueError, match=f"accelerator_kwargs holds {name}.*{field}"):
        checked_arguments({name: value}, 1)


def test_arguments_that_ask_for_nothing_else(monkeypatch, fresh_process, caplog, tmp_path):
    """accelerate's defaults, values that the config has too, and a folder only for accelerate's own files."""
    options = {
        "cpu": False,
        "project_dir": str(tmp_path / "own"),
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=2),
        "dynamo_backend": "no",
        "dynamo_plugin": None,
        "fsdp_plugin": None,
        "mixed_precision": None,
        "split_batches": True,
        "kwargs_handlers": [],
    }
    fields = {"mixed_precision": "no", "train_gradient_accumulation_steps": 2, "logdir": str(tmp_path / "logs")}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = AlignPropConfig(accelerator_kwargs=options, **fields)
    accelerator = make_accelerator(config)
    assert accelerator.device.type == "cpu" and accelerator.gradient_accumulation_steps == 2
    assert (accelerator.project_dir, accelerator.logging_dir) == (str(tmp_path / "own"), str(tmp_path / "logs"))
    assert checkpoint_root(config) == tmp_path / "logs" / "checkpoints"
    (line,) = [record.getMessage() for record in caplog.records if "ACCELERATE" in record.getMessage()]
    assert line == "device cpu, as ACCELERATE_USE_CPU says"


def test_the_command_refuses_and_follows(command, monkeypatch, tiny_sd_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    options = ("train", "--model", tiny_sd_folder, "--reward", "colorfulness", "--num-inference-steps", 2)
    options = (*options, "--batch-size", 1, "--steps", 1, "--output-dir", tmp_path / "out", "--prompts", prompts)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, _, err = command(*options)
    assert code == 2 and len(err.splitlines()) == 1 and "set up for FSDP" in err and not (tmp_path / "out").exists()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code, printed, err = command(*options)
    assert (code, err) == (0, "")
    for line in (
        "device cpu, as ACCELERATE_USE_CPU says",
        "mixed precision bf16, as ACCELERATE_MIXED_PRECISION says",
        "gradient accumulation steps 1: the option holds, not ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
    ):
        assert " ".join(printed.split()).count(line) == 1, printed
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["mixed_precision"] == "bf16"


@pytest.mark.parametrize("number", range(len(COUNT)))
def test_places_are_those_that_accelerate_reads(monkeypatch, number):
    """The variables of several launchers at once, each with another index."""
    for name in (*COUNT, *INDEX):
        monkeypatch.delenv(name, raising=False)
    for k in range(number, len(COUNT)):
        monkeypatch.setenv(COUNT[k], str(8 + k))
        monkeypatch.setenv(INDEX[k], str(k))
    expected = get_cpu_distributed_information()
    assert (
        (first_number(COUNT, 1), first_number(INDEX, 0)) == (expected.world_size, expected.rank) == (8 + number, number)
    )


def test_an_empty_place_is_none():
    environment = {"WORLD_SIZE": "", "LOCAL_RANK": "", "RANK": "0"}
    drop_empty_places(environment)
    assert environment == {"RANK": "0"}
    with pytest.raises(ValueError, match="LOCAL_RANK=two is no whole number"):
        drop_empty_places({"LOCAL_RANK": "two"})
