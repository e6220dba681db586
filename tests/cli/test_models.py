"""Models and schedulers through the command line: a run of each kind on tiny models, and bad input in one line."""

import pytest
import yaml
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from alignprop_fast.making.random_weights import make_folder
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.load_save import save_lora

from .runs import PROMPTS

SIZE = ("--height", "16", "--width", "24")
FEW = ("--num-inference-steps", "2", *PROMPTS, "--device", "cpu")


@pytest.mark.parametrize(
    ("kind", "scheduler", "targets", "guidance"),
    [
        ("sdxl", "dpm++2m", "all", ()),
        ("flux", "flow-euler", "attention+ff", ()),
        ("qwen_image", "flow-euler", "attention+ff", ("--negative-prompt", " ")),
        ("krea2", "flow-euler", "attention+ff", ("--negative-prompt", "dog")),
    ],
)
def test_train_then_sample(command, request, tmp_path, kind, scheduler, targets, guidance):
    folder, run, prompts = request.getfixturevalue(f"tiny_{kind}_folder"), tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("red cat\n")
    how = ("--num-inference-steps", "2", "--device", "cpu", *SIZE, "--scheduler", scheduler, *guidance)
    code, _, err = command(
        *("train", "--model", folder, "--reward", "colorfulness", "--steps", "1", "--batch-size", "1", *how),
        *("--prompts", prompts, "--lora-targets", targets, "--output-dir", run, "--truncation", "last:1"),
    )
    assert code == 0, err
    options = yaml.safe_load((run / "config.yaml").read_text())
    assert options["scheduler"] == scheduler and options["lora_targets"] == targets
    names = load_file(run / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet." if kind == "sdxl" else "transformer.") for name in names)
    assert any(".ff." in name or ".img_mlp." in name for name in names)
    code, _, err = command(
        *("sample", "--model", folder, "--lora", run, "--prompt", "red cat", *how),
        *("--output-dir", tmp_path / "pictures"),
    )
    assert code == 0, err
    assert Image.open(tmp_path / "pictures" / "000_red-cat_seed0.png").size == (24, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheduler", "flow-euler"), "does not fit a StableDiffusionPipeline"),
        (("--scheduler", "pndm"), "euler-ancestral"),
        (("--model-config", "folder"), "for a single .safetensors file"),
    ],
)
def test_bad_input_is_one_line(command, tiny_sd_folder, tmp_path, arguments, message):
    code, _, err = command("sample", "--model", tiny_sd_folder, *FEW, *arguments, "--output-dir", tmp_path / "out")
    assert code == 2 and message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheduler", "ddim"), "scheduler 'ddim' does not fit a ZImagePipeline: use flow-euler or auto"),
        (("--height", "18"), "image size 18 x 24 is not a multiple of 4 pixels: round it"),
        (("--mixed-precision", "fp16"), "--mixed-precision fp16 needs a GPU"),
    ],
)
def test_bad_input_for_z_image(command, tiny_z_image_folder, tmp_path, arguments, message):
    out = ("--output-dir", tmp_path / "out")
    code, _, err = command("sample", "--model", tiny_z_image_folder, *FEW, *SIZE, *arguments, *out)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_said_once_of_a_distilled_model(command, tmp_path):
    folder = make_folder("z_image", tmp_path / "turbo", turbo=True)
    texts = ("--prompt", "red cat", "--prompt", "cat " * 600)
    code, out, err = command(
        *("sample", "--model", folder, *FEW[:2], *texts, *SIZE, "--device", "cpu", "--guidance-scale", "2"),
        *("--output-dir", tmp_path / "out"),
    )
    said = " ".join((out + err).split())
    assert code == 0 and said.count("is distilled to draw without guidance: leave --guidance-scale out") == 1
    assert said.count("Qwen3 reads 512 of its ") == 1


def test_a_single_file_asks_for_the_model_config(command, tiny_sd_folder, tmp_path):
    file = tiny_sd_folder / "unet" / "diffusion_pytorch_model.safetensors"
    code, _, err = command("sample", "--model", file, *FEW, "--output-dir", tmp_path / "out")
    assert code == 2 and "--model-config FOLDER" in err and len(err.splitlines()) == 1


def test_a_lora_of_another_model(command, tiny_z_image_folder, tiny_sd, tmp_path):
    add_lora(tiny_sd, 2)
    save_lora(tiny_sd, tmp_path / "lora")
    code, _, err = command(
        *("sample", "--model", tiny_z_image_folder, "--lora", tmp_path / "lora"),
        *("--output-dir", tmp_path / "out", *FEW, *SIZE),
    )
    assert code == 2 and len(err.splitlines()) == 1
    assert "do not fit this model" in err and "load the model they were made for" in err
    assert not (tmp_path / "out").exists()


def test_adapters_without_a_name_in_one_of_the_files_are_refused_before_the_run(command, tiny_sd, tmp_path):
    """After a run it would be too late. No published model has such blocks."""
    kinds = ["AttnDownBlock2D", *tiny_sd.unet.config.down_block_types[1:]]
    tiny_sd.register_modules(unet=UNet2DConditionModel.from_config(tiny_sd.unet.config, down_block_types=kinds))
    folder = tmp_path / "model"
    tiny_sd.save_pretrained(folder)
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["down_blocks.0.attentions.0.to_q"]))
    save_lora(tiny_sd, folder)
    code, _, err = command(
        *("train", "--model", folder, "--reward", "colorfulness", "--steps", "1", "--batch-size", "1", *FEW, *SIZE),
        *("--output-dir", tmp_path / "run"),
    )
    assert code == 2 and "unet.down_blocks.0.attentions.0.to_q has no name in kohya's files" in " ".join(err.split())
    assert not (tmp_path / "run").exists()
