"""Real pictures, and a CLIP folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignprop_fast.demo import pictures_path
from alignprop_fast.rewards.jpeg_calibration import square_pictures

from .published import write_preprocessor

PHOTOS = Path(__file__).parent / "photos"


@pytest.fixture(scope="session")
def pictures() -> Callable[[str, int], Tensor]:
    """pictures("photos" | "demo", size) -> [N, 3, size, size] in [0, 1], exact 8-bit values."""

    def load(name: str, size: int) -> Tensor:
        folder = {"photos": PHOTOS, "demo": pictures_path()}[name]
        return torch.stack(list(square_pictures(folder, size)))

    return load


@pytest.fixture(scope="session")
def clip_folder(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `CLIPModel` folder with random weights, 48 x 48 pixels, and the processor file of the published models."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("models") / "clip"
    shutil.copytree(tiny_sd_folder / "tokenizer", folder)
    text = json.loads((tiny_sd_folder / "text_encoder" / "config.json").read_text())
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"image_size": 48, "patch_size": 16}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision | sizes, projection_dim=32)).save_pretrained(folder)
    write_preprocessor(folder, size=48, crop_size=48)
    return folder
