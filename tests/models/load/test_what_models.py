"""Everything that people give as a model: it is read, or refused in one line that names the remedy."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from alignprop_fast.models.load.pipeline import load_pipeline

from . import models_read, models_refused  # noqa: F401  # they put their rows into CASES
from .files_refused import NO_MODEL
from .given_models import CASES, Shelf
from .original_layout import weights

FORMATS = [case.format for case in CASES]


@pytest.fixture
def shelf(request, tmp_path):
    kinds = ("sd", "sdxl", "sd3", "flux", "z_image", "flux2_klein", "flux2_dev", "qwen_image", "krea2")
    folders = [request.getfixturevalue(f"tiny_{kind}_folder") for kind in (*kinds, "chroma", "lumina2", "sana")]
    return Shelf(*folders, tmp_path)


def _named(answer):
    return [pytest.param(case, id=case.format.name) for case in CASES if (case.format.answer == "refused") == answer]


@pytest.mark.parametrize("case", _named(True))
def test_refused_in_one_line(case, shelf):
    model, config = case.make(shelf)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_pipeline(model, model_config=config)
    message = str(error.value)
    assert case.format.words in message
    assert "\n" not in message and (": " in message)


@pytest.mark.parametrize("case", _named(False))
def test_read(case, shelf, caplog):
    """Every weight equals that of the folder from which the file was made."""
    model, config = case.make(shelf)
    if config is not None and "alone" in case.format.name:  # the folder's own denoiser is not what is read
        config = shutil.copytree(config, shelf.here / "config", ignore=_without_denoiser)
    pipe = load_pipeline(model, model_config=config)
    notes = [record.getMessage() for record in caplog.records if record.name.startswith("alignprop_fast")]
    assert [bool(case.format.words) and case.format.words in note for note in notes] == [True] * bool(case.format.words)
    if not case.same_as:
        return
    expected = DiffusionPipeline.from_pretrained(getattr(shelf, case.same_as), local_files_only=True)
    for name, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            mine, theirs = pipe.components[name].state_dict(), part.state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def _without_denoiser(folder, names):
    return [name for name in names if Path(folder).name in ("unet", "transformer") and name.endswith(".safetensors")]


@pytest.mark.parametrize("name", ["UNet alone", "LoRA"])
def test_the_command_ends_with_one_line(command, tiny_sd_folder, tmp_path, name):
    state = weights(tiny_sd_folder / "unet") if name == "UNet alone" else NO_MODEL["LoRA in kohya's names"][0]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "prompts.txt").write_text("red cat\n")
    out = ("--output-dir", tmp_path / "out", "--device", "cpu")
    code, _, error = command(
        "sample", "--model", tmp_path / "model.safetensors", "--prompts", tmp_path / "prompts.txt", *out
    )
    assert code == 2 and len(error.strip().splitlines()) == 1 and error.startswith("alignprop-fast: ")
    assert not (tmp_path / "out").exists()
