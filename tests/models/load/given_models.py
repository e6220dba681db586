"""Rows of what people give as a model: how the row's file or folder is made, and what comes of it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...loadable import Format
from . import original_layout


@dataclass(frozen=True)
class Shelf:
    """Folders of small models, by kind, and an empty one to make things in."""

    sd: Path
    sdxl: Path
    sd3: Path
    flux: Path
    z_image: Path
    flux2: Path
    flux2_dev: Path
    qwen_image: Path
    krea2: Path
    chroma: Path
    lumina2: Path
    sana: Path
    here: Path

    def write(self, state: dict[str, torch.Tensor]) -> Path:
        return original_layout.write(state, self.here / "model.safetensors")

    def bytes(self, content: bytes, name: str = "model.safetensors") -> Path:
        (self.here / name).write_bytes(content)
        return self.here / name

    def copy(self, folder: Path) -> Path:
        return shutil.copytree(folder, self.here / "copy")


Given = tuple[Path, Path | None]  # model and model config


@dataclass(frozen=True)
class Case:
    format: Format
    make: Callable[[Shelf], Given]
    same_as: str = ""  # the model on the shelf whose weights and pictures are to come out


CASES: list[Case] = []


def read(name: str, same_as: str, words: str = ""):
    return _case(Format(name, "read with a note" if words else "read exactly", words), same_as)


def refused(name: str, words: str):
    return _case(Format(name, "refused", words), "")


def _case(row: Format, same_as: str):
    def put(make: Callable[[Shelf], Given]) -> Callable[[Shelf], Given]:
        CASES.append(Case(row, make, same_as))
        return make

    return put
