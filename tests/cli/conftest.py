"""What several tests of the command line share."""

import shutil

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from alignprop_fast.cli.options import ConfigCommand, command_line
from alignprop_fast.cli.train import TrainCall
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.file import WEIGHTS_NAME
from alignprop_fast.models.lora.load_save import save_lora
from alignprop_fast.training.declaration import Command


@pytest.fixture
def train():
    """train(*arguments): the options that the command line of `train` parses. Raises typer.BadParameter."""
    got = []

    @command_line(Command.TRAIN, TrainCall())
    def train(ctx, options):
        got.append(options.run())

    app = typer.Typer()
    app.command(cls=ConfigCommand)(train)
    app.callback()(lambda: None)
    own = typer.main.get_command(app).commands["train"]

    def read(*arguments):
        own.invoke(own.make_context("train", [str(argument) for argument in arguments]))
        return got.pop()

    return read


@pytest.fixture(scope="module")
def loras(tmp_path_factory, tiny_sd_folder):
    """Two adapters written by train, and files that are each wrong in one way."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("loras")
    for name, rank in (("first", 2), ("second", 3)):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for parameter in add_lora(pipe, rank, alpha=2 * rank):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        save_lora(pipe, folder / name)
    shutil.copytree(folder / "first", folder / "cut")
    content = (folder / "first" / WEIGHTS_NAME).read_bytes()
    (folder / "cut" / WEIGHTS_NAME).write_bytes(content[:-7])
    factors = {
        "unet.mid_block.to_q.lora_A.weight": torch.ones(2, 8),
        "unet.mid_block.to_q.lora_B.weight": torch.ones(8, 2),
    }
    save_file(factors, folder / "foreign.safetensors")
    save_file({key.replace("unet", "transformer"): f for key, f in factors.items()}, folder / "nameless.safetensors")
    pairs = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    guessed = {f"lora_unet_added_embedding_linear_{i}.{end}": pairs[end].clone() for i in (1, 2) for end in pairs}
    save_file(guessed, folder / "guessed.safetensors")
    shutil.copytree(folder / "first", folder / "first:2")
    wide = {
        key: torch.cat([tensor] * 2, -1 if ".lora.down." in key else 0)
        for key, tensor in load_file(folder / "first" / WEIGHTS_NAME).items()
    }
    save_file(wide, folder / "wide.safetensors")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "heldout.txt").write_text("a fish\n")
    (folder / "empty.txt").write_text("")
    return folder
