"""Tiny pipelines in the real diffusers format, and the command line, shared by all tests.

No network, random weights, under a second each.
"""

from __future__ import annotations

import gc
import logging
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

# On tensors this small a second thread costs time, and on a busy machine a great deal of it. Read once, when torch is
# imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU the kernels run in Triton's interpreter, which must be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: begun last, one of them would run alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_emulated_gpu.py")


def pytest_collection_finish() -> None:
    """What is imported stays, so collections of garbage need not search it: some tests make hundreds."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries report leaks when the process ends


@pytest.fixture(scope="session", autouse=True)
def tables_of_their_own(tmp_path_factory: pytest.TempPathFactory):
    """Cost tables that tests measure do not mix with the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("alignprop_fast.generate.cost_table", "alignprop_fast.cli.kept_counts"):
            patch.setattr(f"{module}.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `StableDiffusionPipeline` folder: UNet widths (32, 64), latents 8 x 8, images 16 x 16."""
    from alignprop_fast.making.random_weights import make_sd_folder

    return make_sd_folder(tmp_path_factory.mktemp("models") / "tiny_sd")


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `StableDiffusionXLPipeline` folder: two text encoders, size conditioning, latents 8 x 8, images 16 x 16."""
    from alignprop_fast.making.random_weights import make_sdxl_folder

    return make_sdxl_folder(tmp_path_factory.mktemp("models") / "tiny_sdxl")


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `StableDiffusion3Pipeline` folder: three text encoders, dual attention, latents 8 x 8, images 16 x 16."""
    from alignprop_fast.making.random_weights import make_sd3_folder

    return make_sd3_folder(tmp_path_factory.mktemp("models") / "tiny_sd3")


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `FluxPipeline` folder: guidance embedding, dynamic shift; ask for images of 16 x 16 or so."""
    from alignprop_fast.making.random_weights import make_flux_folder

    return make_flux_folder(tmp_path_factory.mktemp("models") / "tiny_flux")


@pytest.fixture(scope="session")
def tiny_chroma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `ChromaPipeline` folder: T5 with a mask, modulation from one network; ask for images of 16 x 16 or so."""
    from alignprop_fast.making.random_weights import make_chroma_folder

    return make_chroma_folder(tmp_path_factory.mktemp("models") / "tiny_chroma")


@pytest.fixture(scope="session")
def tiny_z_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `ZImagePipeline` folder: Qwen3, captions of their own lengths; ask for images of 16 x 16 or so."""
    from alignprop_fast.making.random_weights import make_z_image_folder

    return make_z_image_folder(tmp_path_factory.mktemp("models") / "tiny_z_image")


@pytest.fixture(scope="session")
def tiny_flux2_klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `Flux2KleinPipeline` folder, not distilled; ask for images of 16 x 16 or so."""
    from alignprop_fast.making.random_weights import make_flux2_klein_folder

    return make_flux2_klein_folder(tmp_path_factory.mktemp("models") / "tiny_flux2_klein")


@pytest.fixture(scope="session")
def tiny_qwen_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `QwenImagePipeline` folder: Qwen2.5-VL, texts of their own lengths, a VAE for videos."""
    from alignprop_fast.making.random_weights import make_qwen_image_folder

    return make_qwen_image_folder(tmp_path_factory.mktemp("models") / "tiny_qwen_image")


@pytest.fixture(scope="session")
def tiny_flux2_dev_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `Flux2Pipeline` folder: Mistral 3, guidance embedding; ask for images of 16 x 16 or so."""
    from alignprop_fast.making.random_weights import make_flux2_dev_folder

    return make_flux2_dev_folder(tmp_path_factory.mktemp("models") / "tiny_flux2_dev")


@pytest.fixture(scope="session")
def tiny_krea2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `Krea2Pipeline` folder, not distilled; ask for images of 16 x 16 or so."""
    from alignprop_fast.making.random_weights import make_krea2_folder

    return make_krea2_folder(tmp_path_factory.mktemp("models") / "tiny_krea2")


@pytest.fixture(scope="session")
def tiny_lumina2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `Lumina2Pipeline` folder: Gemma 2, texts of their own lengths; ask for images of 16 x 16 or so."""
    from alignprop_fast.making.random_weights import make_lumina2_folder

    return make_lumina2_folder(tmp_path_factory.mktemp("models") / "tiny_lumina2")


@pytest.fixture(scope="session")
def tiny_sana_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `SanaPipeline` folder: Gemma 2, linear attention, DC-AE, DPM-Solver; ask for images of 16 x 16 or so."""
    from alignprop_fast.making.random_weights import make_sana_folder

    return make_sana_folder(tmp_path_factory.mktemp("models") / "tiny_sana")


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


@pytest.fixture
def tiny_sd3(tiny_sd3_folder: Path):
    """The pipeline of `tiny_sd3_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, all weights frozen."""
    from diffusers import StableDiffusion3Pipeline

    return _fresh(StableDiffusion3Pipeline, tiny_sd3_folder)


@pytest.fixture
def tiny_flux(tiny_flux_folder: Path):
    """The pipeline of `tiny_flux_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, all weights frozen."""
    from diffusers import FluxPipeline

    return _fresh(FluxPipeline, tiny_flux_folder)


@pytest.fixture
def tiny_chroma(tiny_chroma_folder: Path):
    """The pipeline of `tiny_chroma_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, all weights frozen."""
    from diffusers import ChromaPipeline

    return _fresh(ChromaPipeline, tiny_chroma_folder)


@pytest.fixture
def tiny_z_image(tiny_z_image_folder: Path):
    """The pipeline of `tiny_z_image_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, all weights frozen."""
    from diffusers import ZImagePipeline

    return _fresh(ZImagePipeline, tiny_z_image_folder)


@pytest.fixture
def tiny_flux2_klein(tiny_flux2_klein_folder: Path):
    """The pipeline of `tiny_flux2_klein_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, weights frozen."""
    from diffusers import Flux2KleinPipeline

    return _fresh(Flux2KleinPipeline, tiny_flux2_klein_folder)


@pytest.fixture
def tiny_qwen_image(tiny_qwen_image_folder: Path):
    """The pipeline of `tiny_qwen_image_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, weights frozen."""
    from diffusers import QwenImagePipeline

    return _fresh(QwenImagePipeline, tiny_qwen_image_folder)


@pytest.fixture
def tiny_flux2_dev(tiny_flux2_dev_folder: Path):
    """The pipeline of `tiny_flux2_dev_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, weights frozen."""
    from diffusers import Flux2Pipeline

    return _fresh(Flux2Pipeline, tiny_flux2_dev_folder)


@pytest.fixture
def tiny_krea2(tiny_krea2_folder: Path):
    """The pipeline of `tiny_krea2_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, weights frozen."""
    from diffusers import Krea2Pipeline

    return _fresh(Krea2Pipeline, tiny_krea2_folder)


@pytest.fixture
def tiny_lumina2(tiny_lumina2_folder: Path):
    """The pipeline of `tiny_lumina2_folder`, freshly loaded, fp32 on the CPU, flow-match Euler, weights frozen."""
    from diffusers import Lumina2Pipeline

    return _fresh(Lumina2Pipeline, tiny_lumina2_folder)


@pytest.fixture
def tiny_sana(tiny_sana_folder: Path):
    """The pipeline of `tiny_sana_folder`, freshly loaded, fp32 on the CPU, DPM-Solver for flow matching, frozen."""
    from diffusers import SanaPipeline

    return _fresh(SanaPipeline, tiny_sana_folder)


def _fresh(pipeline_class, folder: Path):
    # Not a copy of one that was loaded before: loaded weights lie at other addresses modulo 64 than copies, which
    # changes the last bits of a product, and tests compare these pipelines with freshly loaded ones.
    pipe = pipeline_class.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipe


@pytest.fixture(scope="module")
def steady_clock():
    """Options take the seconds of their order, the richest the fewest, where they are measured; not those of a clock,
    which on a busy machine says at times that to recompute is faster than to keep. For checks of one plan's peak."""
    import importlib
    from collections import defaultdict

    from alignprop_fast.planner import GRADES

    trace = importlib.import_module("alignprop_fast.runtime.trace")  # the name in `runtime` is the function

    def timed(work, options):
        timer = trace._Timer(work.device)
        trace._run(work, options, timer)
        rank = min((GRADES.index(option) for option in options.values()), default=0)
        return defaultdict(float, dict.fromkeys(timer.seconds(), 1e-3 * (1 + rank)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_timed", timed)
        yield


@pytest.fixture
def fresh_process():
    """What a command may set once and for all in a process of its own: loggers, and accelerate's one state."""
    own, warned = logging.getLogger("alignprop_fast"), logging.getLogger("py.warnings")
    before = [(logger, logger.handlers[:], logger.propagate) for logger in (own, warned)]
    yield
    for logger, handlers, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
    logging.captureWarnings(False)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def files_up_to():
    """A context in which the system lets no file grow beyond so many bytes: a full disk, as far as a program sees."""
    import resource

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def command(capsys, fresh_process, monkeypatch):
    """Runs a command in this process; returns exit code, stdout and stderr. A run draws two sample pictures."""
    from alignprop_fast.cli.app import main

    monkeypatch.setattr("alignprop_fast.cli.session.SAMPLE_PICTURES", 2)

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return leaving.value.code, captured.out, captured.err

    return run
