"""Tiny pipelines in the real diffusers format, and the command line, shared by all tests.

No network, random weights, under a second each.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

# On tensors this small a second thread costs time, and on a busy machine a great deal of it. Read once, when torch is
# imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell ignores Ctrl-C for its background jobs, and their child processes inherit that, to which tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
def compiled_kernels():
    """Builds csrc/ for this machine, once in torch's extension cache, if there is a compiler."""
    from alignprop_fast.ops import autotune, extension

    arches = extension.present_arches()
    if extension.installed(arches) is None:
        try:
            extension.build(extension.library_path(arches), arches)
        except extension.BuildError as error:
            pytest.skip(f"csrc/ not built: {error}")
    # A test before this one may have found nothing.
    extension.missing.cache_clear()
    autotune.forget()


def _tiny(name: str):
    """Two fixtures: the folder of the pipeline `name` of `random_weights`, and the pipeline, freshly loaded for each
    test, fp32 on the CPU, all weights frozen. Ask for pictures of 16 x 16 or so."""

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        from alignprop_fast.making.random_weights import make_folder

        return make_folder(name, tmp_path_factory.mktemp("models") / f"tiny_{name}")

    @pytest.fixture
    def pipeline(request: pytest.FixtureRequest):
        from diffusers import DiffusionPipeline

        # Not a copy of one that was loaded before: loaded weights lie at other addresses modulo 64 than copies, which
        # changes the last bits of a product, and tests compare these pipelines with freshly loaded ones.
        pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(f"tiny_{name}_folder"), local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        return pipe

    return folder, pipeline


tiny_sd_folder, tiny_sd = _tiny("sd")
tiny_sdxl_folder, tiny_sdxl = _tiny("sdxl")
tiny_sd3_folder, tiny_sd3 = _tiny("sd3")
tiny_flux_folder, tiny_flux = _tiny("flux")
tiny_chroma_folder, tiny_chroma = _tiny("chroma")
tiny_z_image_folder, tiny_z_image = _tiny("z_image")
tiny_flux2_klein_folder, tiny_flux2_klein = _tiny("flux2_klein")
tiny_flux2_dev_folder, tiny_flux2_dev = _tiny("flux2_dev")
tiny_qwen_image_folder, tiny_qwen_image = _tiny("qwen_image")
tiny_krea2_folder, tiny_krea2 = _tiny("krea2")
tiny_lumina2_folder, tiny_lumina2 = _tiny("lumina2")
tiny_sana_folder, tiny_sana = _tiny("sana")


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
