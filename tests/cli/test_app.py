"""The command line as a user sees it: its help, and one line for all bad input."""

import subprocess
import sys

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from .runs import TINY, WEIGHTS, snapshot


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("demo", "train", "plan", "sample", "evaluate", "merge", "doctor")),
        (
            ("train",),
            (
                "--memory-budget",
                "--host-memory",
                "default: auto",
                "--num-inference-steps",
                "--resume",
                "24GiB",
                "Examples",
            ),
        ),
        (("plan",), ("--gpu", "--table", "--json", "--host-memory", "Examples")),
        (("sample",), ("--lora", "--images-per-prompt", "Examples")),
        (("demo",), ("--output-dir", "Examples")),
        (("evaluate",), ("--lora", "--scale", "--heldout-prompts", "gained", "Examples")),
        (("merge",), ("ADAPTER:WEIGHT", "--rank", "--path-steps", "Examples")),
        (("doctor",), ("--device", "--json", "--deterministic", "Examples")),
    ],
)
def test_help_teaches(command, monkeypatch, arguments, words):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = command(*arguments, "--help")
    assert code == 0 and err == ""
    assert not [word for word in words if word not in out]


def test_help_waits_for_no_heavy_library():
    code = (
        "import sys; from alignprop_fast.cli.app import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'diffusers', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("written", ["null", "none", "auto"])
def test_a_budget_of_an_older_run_keeps_its_meaning(tmp_path, written):
    """Old runs without a budget have null in config.yaml, which then meant none."""
    from alignprop_fast.cli.options import ConfigCommand
    from alignprop_fast.cli.train import train
    from alignprop_fast.training.options import TrainOptions

    app = typer.Typer()
    app.command(cls=ConfigCommand)(train)
    app.callback()(lambda: None)
    file = tmp_path / "config.yaml"
    file.write_text(f"memory_budget: {written}\n")
    own = typer.main.get_command(app).commands["train"]
    context = own.make_context("train", ["--config", str(file)])
    assert context.params["memory_budget"] == ("none" if written == "null" else written)
    assert own.make_context("train", []).params["memory_budget"] == TrainOptions().memory_budget == "auto"


BAD = {
    "no model folder": (["--model", "{tmp}/none"], "no model folder"),
    "a folder that is no model": (["--model", "{tmp}/empty"], "model_index.json"),
    "missing weights": (["--model", "{tmp}/partial"], "unet of"),
    "no vocabulary": (["--model", "{tmp}/mute"], "no vocabulary"),
    "truncated weights": (["--model", "{tmp}/cut"], "damaged"),
    "unknown reward": (["--reward", "colourfulness"], "did you mean 'colorfulness'"),
    "unknown function": (["--reward", "json:nothing"], "does not exist"),
    "reward without gradient": (["--reward", "no_gradient_of_test:score"], "without gradient"),
    "no reward model": (["--reward", "clip", "--reward-model", "{tmp}/none"], "no CLIP model"),
    "reward model without use": (["--reward-model", "{tmp}/none"], "leave it out"),
    "pickled weights": (["--reward", "hpsv2", "--reward-model", "{tmp}/hps.pt"], "--allow-pickle"),
    "reward without weights": (["--reward", "clip,hpsv2"], "--reward-model hpsv2=PATH"),
    "a model for one of two rewards": (["--reward", "clip,pickscore", "--reward-model", "{tmp}/none"], "NAME=PATH"),
    "no prompts file": (["--prompts", "{tmp}/none.txt"], "no prompts file"),
    "empty prompts file": (["--prompts", "{tmp}/empty.txt"], "holds no prompts"),
    "binary prompts file": (["--prompts", "{tmp}/binary.txt"], "not UTF-8"),
    "zero batch": (["--batch-size", "0"], "--batch-size"),
    "half a step": (["--steps", "1.5"], "--steps"),
    "impossible budget": (["--memory-budget", "1MiB"], "leanest plan needs"),
    "no budget": (["--memory-budget", "plenty"], "24GiB"),
    "a budget beyond the device": (["--memory-budget", "100000GiB"], "more than this computer has"),
    "no learning rate": (["--learning-rate", "nan"], "--learning-rate is nan: use a number above 0"),
    "unknown optimizer": (["--optimizer", "adam"], "adamw8bit"),
    "unknown truncation": (["--truncation", "first:3"], "last:K"),
    "nothing to watch": (["--patience", "2"], "add --watch-reward"),
    "weights of nothing": (["--diversity-model", "{tmp}/none"], "add --watch-reward"),
    "unknown watched reward": (["--watch-reward", "clap"], "did you mean 'clip'"),
    "no watched prompts": (["--watch-reward", "clip", "--watch-prompts", "{tmp}/none.txt"], "no prompts file"),
    "no patience": (["--watch-reward", "clip", "--patience", "0"], "--patience"),
    "negative weight": (["--kl-weight", "-1"], "--kl-weight"),
    "endless weight": (["--kl-weight", "inf"], "--kl-weight is inf: use 0 (off) or more"),
    "too long truncation": (["--truncation", "last:3"], "use 1 to 2"),
    "odd size": (["--height", "13"], "multiple of 8"),
    "no guidance": (["--guidance-scale", "nan"], "--guidance-scale"),
    "endless seed": (["--seed", "1" + "0" * 30], "--seed"),
    "too much noise": (["--eta", "2"], "--eta"),
    "fp16 on the CPU": (["--mixed-precision", "fp16"], "needs a GPU"),
    "no such device": (["--device", "cuda:99"], "--device cpu"),
    "unknown device": (["--device", "tpu"], "use auto, cpu, cuda"),
    "unknown option": (["--batchsize", "2"], "--batch-size"),
    "resume of nothing": (["--resume"], "nothing to resume"),
    "resume from nothing": (["--resume-from", "{tmp}/empty"], "nothing to resume"),
    "the folder of nobody": (["--model", "~nobody-of-this-name/model"], "write the whole path"),
    "a file in the way": (["--output-dir", "{tmp}/empty.txt/out"], "is a file"),
    "a folder nobody can write": (["--output-dir", "/proc/none"], "cannot write to /proc"),
    "no config": (["--config", "{tmp}/none.yaml"], "cannot read the config file"),
    "bad YAML": (["--config", "{tmp}/bad.yaml"], "not valid YAML in line 2"),
    "YAML that is no mapping": (["--config", "{tmp}/empty.txt"], "contains no options"),
    "unknown key": (["--config", "{tmp}/unknown.yaml"], "did you mean 'batch_size'"),
    "list value": (["--config", "{tmp}/list.yaml"], "must be a single value"),
    "bad value in YAML": (["--config", "{tmp}/value.yaml"], "--eta"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, tiny_sd_folder):
    """A folder of files that are each wrong in one way."""
    import shutil

    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "bad.yaml").write_text("steps: 3\nseed: : 1\n")
    (folder / "unknown.yaml").write_text("batchsize: 3\n")
    (folder / "list.yaml").write_text("steps: [1, 2]\n")
    (folder / "value.yaml").write_text("eta: yes\n")
    shutil.copytree(tiny_sd_folder / "tokenizer", folder, dirs_exist_ok=True)
    torch.save({}, folder / "hps.pt")
    shutil.copytree(tiny_sd_folder, folder / "cut")
    weights = next((folder / "cut" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    partial = shutil.copytree(tiny_sd_folder, folder / "partial") / "unet" / weights.name
    tensors = load_file(partial)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.weight"}, partial)
    for file in (shutil.copytree(tiny_sd_folder, folder / "mute") / "tokenizer").iterdir():
        file.unlink()
    (folder / "no_gradient_of_test.py").write_text("def score(i, p, m):\n    return i.detach().mean((1, 2, 3)), {}\n")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, bad_files, tiny_sd_folder, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(bad_files)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    arguments, remedy = BAD[case]
    before = snapshot(bad_files)
    code, _, err = command(
        *("train", "--model", tiny_sd_folder, "--reward", "colorfulness", "--output-dir", tmp_path / "out", *TINY),
        *(argument.replace("{tmp}", str(bad_files)) for argument in arguments),
    )
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("alignprop-fast: ") and remedy in err
    assert snapshot(bad_files) == before and list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_there_is_refused(command, tmp_path, tiny_sd_folder, monkeypatch):
    import importlib.util

    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    code, _, err = command("train", "--model", tiny_sd_folder, "--log-with", "wandb", "--output-dir", tmp_path / "o")
    assert code == 2 and "pip install wandb" in err and list(tmp_path.iterdir()) == []


def test_a_failed_set_up_takes_the_trackers_folder_with_it(command, tmp_path, tiny_sd_folder):
    pytest.importorskip("tensorboard")
    code, _, err = command(
        *("train", "--model", tiny_sd_folder, "--reward", "colorfulness", *TINY, "--log-with", "tensorboard"),
        *("--height", "12", "--output-dir", tmp_path / "out"),
    )
    assert code == 2 and "multiple of 8" in err and list(tmp_path.iterdir()) == []


def test_sample_overwrites_nothing(command, tmp_path, tiny_sd_folder):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = command("sample", "--model", tiny_sd_folder, "--output-dir", tmp_path)
    assert code == 2 and "not empty" in err and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    code, _, err = command(
        "sample", "--model", tiny_sd_folder, "--lora", tmp_path, "--prompt", "a cat", "--output-dir", tmp_path / "s"
    )
    assert code == 2 and WEIGHTS in err and not (tmp_path / "s").exists()


@pytest.mark.parametrize("option", [("--cuda-graphs", "on"), ("--compiled",)])
def test_what_needs_a_gpu_says_so(command, tiny_sd_folder, tmp_path, option):
    code, _, err = command(
        *("train", "--model", tiny_sd_folder, "--reward", "colorfulness", *TINY, *option),
        *("--output-dir", tmp_path / "out"),
    )
    assert code == 2 and len(err.splitlines()) == 1 and f"{option[0]} needs a GPU" in err
    assert list(tmp_path.iterdir()) == []
