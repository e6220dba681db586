"""The built wheel, which users without a checkout get: everything once, and nothing named `kernels` at its top."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import alignprop_fast

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("alignprop_fast", "csrc", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by this environment's setuptools from a copy, since a build leaves its traces beside the sources."""
    pytest.importorskip("setuptools", minversion="77")
    copy, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(dist)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, check=True)
    return next(dist.glob("*.whl"))


@pytest.mark.slow("builds a wheel")
def test_the_wheel_holds_every_file_of_the_package_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "alignprop_fast"
    files = [
        path
        for folder in (package, package / "kernels", package / "csrc")
        for path in folder.rglob("*")
        if path.is_file()
    ]
    expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    # The library of csrc/ is there only where the build could import torch and found a compiler.
    found = [name for name in names if ".dist-info/" not in name and not name.startswith("alignprop_fast/ops/compiled")]
    assert {"alignprop_fast/kernels/guided_step.py", "alignprop_fast/csrc/bindings.cpp"} <= expected
    assert "alignprop_fast/demo/model/unet/diffusion_pytorch_model.safetensors" in expected
    assert sorted(found) == sorted(expected)


@pytest.mark.slow("builds a wheel")
def test_an_installed_wheel_finds_its_kernels_and_takes_no_other_name(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)  # which is what installing pure Python does
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import alignprop_fast, importlib.util as u\n"
        "print(alignprop_fast.__file__, u.find_spec('alignprop_fast.kernels.guided_step').origin)"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert all(path.startswith(str(tmp_path)) for path in result.stdout.split())
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".dist-info")} == {"alignprop_fast"}


@pytest.mark.slow("starts a process that loads a model")
def test_a_package_that_is_on_the_path_alone_knows_its_versions(tmp_path, tiny_sd_folder):
    """No distribution is installed then. Every cost table and every run names its versions."""
    (tmp_path / "alignprop_fast").symlink_to(ROOT / "alignprop_fast")
    code = f"""
import importlib.metadata as metadata
found = metadata.Distribution.from_name
def hidden(name):
    if name.replace("_", "-") == "alignprop-fast":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.Distribution.from_name = hidden
import alignprop_fast
from diffusers import StableDiffusionPipeline
from alignprop_fast.generate.cost_table import step_origin
from alignprop_fast.training.state import package_versions
pipe = StableDiffusionPipeline.from_pretrained({str(tiny_sd_folder)!r}, local_files_only=True)
sampler = alignprop_fast.DifferentiableSampler(pipe, 2)
origin, found = step_origin(sampler._blank_step(1, None)), package_versions()
print(alignprop_fast.__file__, origin["alignprop_fast"], found["alignprop-fast"], found["torch"], sep="\\n")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    file, in_table, own, of_torch = run.stdout.splitlines()
    assert file.startswith(str(tmp_path)) and in_table.startswith(f"{alignprop_fast.__version__}, code ")
    assert (own, of_torch) == (alignprop_fast.__version__, torch.__version__)


@pytest.mark.slow("builds a wheel")
def test_the_wheel_has_the_version_that_the_package_says(wheel):
    assert wheel.name.startswith(f"alignprop_fast-{alignprop_fast.__version__}-")
