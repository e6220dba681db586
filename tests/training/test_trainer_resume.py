"""A resumed run equals the uninterrupted run, to the last byte of its adapters; also after SIGKILL."""

import json
import random
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs
from peft import LoraConfig

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.models.lean.quantization import is_quantized, quantize_linears
from alignprop_fast.models.load.pipeline import load_pipeline
from alignprop_fast.models.lora.load_save import load_lora
from alignprop_fast.training.checkpoint import checkpoints
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.state import _check_same
from alignprop_fast.training.trainer import AlignPropTrainer

PROMPTS = ("the red cat", "a dog", "the cat and the dog")
STEPS = 5


def draw_prompt():
    return random.choice(PROMPTS), {}


def ramp_reward(images_BCHW, prompts, metadata):
    ramp_W = torch.linspace(0, 1, images_BCHW.shape[-1])
    return -((images_BCHW - ramp_W) ** 2).mean(dim=(1, 2, 3)), {}


def make_trainer(folder, output_dir, use_lora=True, **options):
    defaults = {
        "mixed_precision": "no",
        "sample_num_steps": 2,
        "train_batch_size": 2,
        "truncated_rand_backprop_minmax": (0, 2),
        "num_epochs": STEPS,
    }
    config = AlignPropConfig(**{**defaults, "output_dir": str(output_dir), **options})
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=use_lora)
    return AlignPropTrainer(config, ramp_reward, draw_prompt, pipeline)


# They give each step another learning rate, and an average that differs from the weights.
SCHEDULED = {"lr_scheduler": "cosine", "warmup_steps": 1, "ema_decay": 0.5, "train_learning_rate": 1e-2}


def average(folder):
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    return torch.cat([tensor.flatten() for tensor in state["average"]["weights"]])


def adapter_bytes(folder):
    return (folder / "pytorch_lora_weights.safetensors").read_bytes()


def newest(output_dir):
    return checkpoints(output_dir / "checkpoints")[-1]


OPTIMIZERS = ["adamw", "adafactor"]
if find_spec("bitsandbytes"):
    OPTIMIZERS += ["adamw8bit", "ademamix8bit"]
if find_spec("prodigyopt"):
    OPTIMIZERS += ["prodigy"]


# `make test` runs the first and the last; the others write and read their states by the same code.
OTHERS = pytest.mark.slow("trains three times for each optimizer")


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        ("adamw", "fp32"),
        (OPTIMIZERS[-1], "bf16"),
        *(pytest.param(name, "fp32", marks=OTHERS) for name in OPTIMIZERS[1:]),
    ],
)
def test_resuming_gives_the_same_bytes(tiny_sd_folder, tmp_path, optimizer, dtype):
    options = {"optimizer": optimizer, "adapter_dtype": dtype, "train_gradient_accumulation_steps": 2, **SCHEDULED}
    options["num_epochs"] = 3
    make_trainer(tiny_sd_folder, tmp_path / "whole", **options).train()
    parts = {**options, "save_freq": 2}
    make_trainer(tiny_sd_folder, tmp_path / "parts", **parts).train(2)
    torch.randn(11), random.random()  # as other work of the process would
    resumed = make_trainer(tiny_sd_folder, tmp_path / "parts", resume_from=str(tmp_path / "parts"), **parts)
    assert (resumed.first_epoch, resumed.global_step) == (2, 2)
    resumed.train()
    saved = checkpoints(tmp_path / "parts" / "checkpoints")
    assert [path.name for path in saved] == ["checkpoint_2", "checkpoint_3"]
    assert adapter_bytes(saved[1]) == adapter_bytes(newest(tmp_path / "whole")) != adapter_bytes(saved[0])
    assert torch.equal(average(newest(tmp_path / "parts")), average(newest(tmp_path / "whole")))


@pytest.mark.parametrize("base", ["int8", *(["nf4"] if find_spec("bitsandbytes") else [])])
def test_resuming_on_a_quantised_base(tiny_sd_folder, tmp_path, base):
    options = {"base_dtype": base, "train_learning_rate": 1e-2}
    make_trainer(tiny_sd_folder, tmp_path / "whole", **options).train(2)
    make_trainer(tiny_sd_folder, tmp_path / "parts", **options).train(1)
    resumed = make_trainer(tiny_sd_folder, tmp_path / "parts", resume_from=str(tmp_path / "parts"), **options)
    resumed.train(2)
    assert adapter_bytes(newest(tmp_path / "parts")) == adapter_bytes(newest(tmp_path / "whole"))
    assert is_quantized(resumed.sd_pipeline.unet)
    # The same adapters on the same base model draw the same pictures outside the trainer.
    pipe = load_pipeline(tiny_sd_folder)
    pipe.scheduler = resumed.sd_pipeline.scheduler
    quantize_linears(pipe.unet, base, torch.device("cpu"), torch.float32)

    def drawn(sampler):
        return sampler("the red cat", generator=torch.Generator().manual_seed(0), grad_steps=())

    scale = resumed.config.sample_guidance_scale
    without = drawn(DifferentiableSampler(pipe, 2, scale))
    load_lora(pipe, newest(tmp_path / "parts"))
    found, expected = drawn(DifferentiableSampler(pipe, 2, scale)), drawn(resumed.sampler)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - without).abs().max() > 1e-3


@pytest.mark.parametrize("in_backward", [False, True])
def test_resuming_full_fine_tuning(tiny_sd_folder, tmp_path, in_backward):
    options = {"use_lora": False, "optimizer_in_backward": in_backward, **(SCHEDULED if in_backward else {})}
    make_trainer(tiny_sd_folder, tmp_path / "whole", **options).train(2)
    make_trainer(tiny_sd_folder, tmp_path / "parts", **options).train(1)
    make_trainer(tiny_sd_folder, tmp_path / "parts", **options, resume_from=str(tmp_path / "parts")).train(2)
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (newest(tmp_path / "parts") / file).read_bytes() == (newest(tmp_path / "whole") / file).read_bytes()
    if in_backward:
        assert torch.equal(average(newest(tmp_path / "parts")), average(newest(tmp_path / "whole")))


def test_a_frozen_style_beside_the_trained_adapter(tiny_sd_folder, tmp_path):
    """The style stays on, unchanged; checkpoints hold the other adapter, and a resumed run has the same bytes."""

    def trainer(output_dir, **options):
        config = AlignPropConfig(
            mixed_precision="no",
            sample_num_steps=2,
            train_batch_size=1,
            truncation="full",
            num_epochs=2,
            output_dir=str(output_dir),
            **options,
        )
        pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_sd_folder))
        generator = torch.Generator().manual_seed(3)
        for name, targets in (("style", ["to_q", "to_k"]), ("reward", ["to_k", "to_v"])):
            pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_rslora=True), name)
        pipeline.sd_pipeline.set_adapters(["style", "reward"])
        with torch.no_grad():
            for name, parameter in pipeline.unet.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                    parameter.requires_grad_(".reward." in name)
        return AlignPropTrainer(config, ramp_reward, draw_prompt, pipeline)

    def adapter(one, name):
        return {n: p.detach().clone() for n, p in one.sd_pipeline.unet.named_parameters() if f".{name}." in n}

    whole = trainer(tmp_path / "whole")
    style, reward = adapter(whole, "style"), adapter(whole, "reward")
    whole.train()
    assert all(torch.equal(p, style[n]) for n, p in adapter(whole, "style").items())
    assert not any(torch.equal(p, reward[n]) for n, p in adapter(whole, "reward").items())
    assert set(whole.sd_pipeline.sd_pipeline.get_active_adapters()) == {"style", "reward"}
    trainer(tmp_path / "parts").train(1)
    trainer(tmp_path / "parts", resume_from=str(tmp_path / "parts")).train()
    assert adapter_bytes(newest(tmp_path / "parts")) == adapter_bytes(newest(tmp_path / "whole"))
    pipe = load_pipeline(tiny_sd_folder)
    pipe.load_lora_weights(newest(tmp_path / "whole"), adapter_name="reward")
    loaded, trained = dict(pipe.unet.named_parameters()), adapter(whole, "reward")
    assert {n for n in loaded if ".lora_" in n} == set(trained)
    assert all(torch.equal(loaded[n], p) for n, p in trained.items())


def test_trl_project_options_say_where_and_how_many(tiny_sd_folder, tmp_path):
    project = {
        "logging_dir": str(tmp_path / "logs"),
        "automatic_checkpoint_naming": True,
        "total_limit": 2,
        "project_dir": str(tmp_path / "save"),
    }
    make_trainer(tiny_sd_folder, "", project_kwargs=project).train(4)
    found = checkpoints(tmp_path / "save" / "checkpoints")
    assert [path.name for path in found] == ["checkpoint_3", "checkpoint_4"]
    resumed = make_trainer(
        tiny_sd_folder, "", project_kwargs=project, resume_from=str(tmp_path / "save/checkpoints/checkpoint_3")
    )
    assert resumed.first_epoch == 3


def test_a_checkpoint_loads_as_lora_in_diffusers(tiny_sd, tiny_sd_folder, tmp_path):
    trainer = make_trainer(tiny_sd_folder, tmp_path)
    trainer.train(1)
    tiny_sd.load_lora_weights(newest(tmp_path))
    loaded = dict(tiny_sd.unet.named_parameters())
    for name, parameter in trainer.sd_pipeline.unet.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, loaded[name.replace(".default.", ".default_0.")])


def test_refusals_are_one_line(tiny_sd_folder, tmp_path):
    make_trainer(tiny_sd_folder, tmp_path).train(3)

    def refused(match, error=ValueError, **options):
        with pytest.raises(error, match=match) as caught:
            make_trainer(tiny_sd_folder, tmp_path, **options)
        assert "\n" not in str(caught.value)

    resume = {"resume_from": str(tmp_path)}
    refused("holds checkpoints of an earlier run")
    refused("no checkpoint to resume from", FileNotFoundError, resume_from=str(tmp_path / "elsewhere"))
    refused("lora_rank=4: resume with the same", lora_rank=8, **resume)
    refused("optimizer=adamw: resume with the same", optimizer="adafactor", **resume)
    damaged = newest(tmp_path) / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    refused("checkpoint_3 is damaged .*: resume from .*checkpoint_2", **resume)
    good = make_trainer(tiny_sd_folder, tmp_path, resume_from=str(tmp_path / "checkpoints" / "checkpoint_2"))
    good.train(3)
    assert make_trainer(tiny_sd_folder, tmp_path, **resume).first_epoch == 3


def test_an_option_that_a_checkpoint_is_older_than_had_its_default(tmp_path):
    saved = asdict(AlignPropConfig(lora_rank=8))
    del saved["adapter_dtype"]
    _check_same(AlignPropConfig(lora_rank=8), saved, tmp_path)
    with pytest.raises(ValueError, match="made with adapter_dtype=fp32"):
        _check_same(AlignPropConfig(lora_rank=8, adapter_dtype="bf16", mixed_precision="bf16"), saved, tmp_path)


KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)  # no threads before the forks
from pathlib import Path
from test_trainer_resume import SCHEDULED, checkpoints, make_trainer
folder, output, steps = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])

def start():
    child = os.fork()
    if child:
        return child
    resume = {"resume_from": str(output)} if checkpoints(output / "checkpoints") else {}
    make_trainer(folder, output, num_checkpoint_limit=2, num_epochs=steps, **SCHEDULED, **resume).train()
    os._exit(0)

for kill in range(3):
    seen = checkpoints(output / "checkpoints")[-1:]
    child = start()
    while checkpoints(output / "checkpoints")[-1:] == seen:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    killed_by = os.WTERMSIG(os.waitpid(child, 0)[1])
    assert killed_by == signal.SIGKILL, "the run was over before it could be killed"
assert os.waitpid(start(), 0)[1] == 0
"""


@pytest.mark.slow("kills and resumes a run many times")
def test_sigkill_at_any_moment_loses_nothing(tiny_sd_folder, tmp_path, request):
    """A run whose process is killed three times, at random moments after it has saved something new."""
    steps, output = 24, tmp_path / "killed"
    make_trainer(tiny_sd_folder, tmp_path / "whole", save_freq=1000, num_epochs=steps, **SCHEDULED).train()
    here = str(request.path.parent)
    arguments = [here, str(tiny_sd_folder), str(output), str(steps)]
    run = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert newest(output).name == newest(tmp_path / "whole").name == f"checkpoint_{steps}"
    assert adapter_bytes(newest(output)) == adapter_bytes(newest(tmp_path / "whole"))
    assert torch.equal(average(newest(output)), average(newest(tmp_path / "whole")))


def test_a_checkpoint_of_options_that_are_objects(tiny_sd_folder, tmp_path):
    handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=5))]
    options = {"accelerator_kwargs": {"kwargs_handlers": handlers}, "project_kwargs": {"project_dir": tmp_path}}
    folder = make_trainer(tiny_sd_folder, tmp_path / "out", **options).save_checkpoint()
    saved = json.loads((folder / "config.json").read_text())
    assert saved["project_kwargs"] == {"project_dir": str(tmp_path)}
