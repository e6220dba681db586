"""Tiny pipelines in the real diffusers format, shared by all tests. No network, random weights, under a second each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignprop_fast.models.random_weights import make_sd_folder, make_sdxl_folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On tensors this small a second thread costs time, and on a busy machine a great deal of it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `StableDiffusionPipeline` folder: UNet widths (32, 64), latents 8 x 8, images 16 x 16."""
    return make_sd_folder(tmp_path_factory.mktemp("models") / "tiny_sd")


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `StableDiffusionXLPipeline` folder: two text encoders, size conditioning, latents 8 x 8, images 16 x 16."""
    return make_sdxl_folder(tmp_path_factory.mktemp("models") / "tiny_sdxl")


@pytest.fixture
def tiny_sd(tiny_sd_folder: Path):
    """The pipeline of `tiny_sd_folder`, freshly loaded, fp32 on the CPU, DDIM, all weights frozen."""
    from diffusers import StableDiffusionPipeline

    return _fresh(StableDiffusionPipeline, tiny_sd_folder)


@pytest.fixture
def tiny_sdxl(tiny_sdxl_folder: Path):
    """The pipeline of `tiny_sdxl_folder`, freshly loaded, fp32 on the CPU, DDIM, all weights frozen."""
    from diffusers import StableDiffusionXLPipeline

    return _fresh(StableDiffusionXLPipeline, tiny_sdxl_folder)


def _fresh(pipeline_class, folder: Path):
    pipe = pipeline_class.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipe
