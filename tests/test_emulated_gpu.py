"""The package on a GPU that is emulated (`emulated_gpu/emulate.py`), in processes of their own, which see no other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).with_name("emulated_gpu")

# What shares a process, so that several can run at once and few import everything anew.
GROUPS = {
    "training": ("autocast", "budget", "devices", "graphs", "training"),
    "chains": ("results", "text_encoders"),
    "memory": ("memory", "offload", "out_of_memory"),
    "kernels": ("attention_autotune", "doctor", "kernels", "lora_autotune"),
}

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has CUDA of its own"),
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or shutil.which("g++") is None,
        reason="no g++ to build the emulated device with",
    ),
]


def run(files, marked, home):
    command = [sys.executable, "-P", "-m", "pytest", "-p", "emulate", "--tb=short", "-m", marked, *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "HOME": str(home)}
    result = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.slow("minutes of checks on an emulated GPU")
@pytest.mark.parametrize("group", GROUPS)
def test_on_an_emulated_gpu(group, tmp_path):
    run([FOLDER / f"check_{name}.py" for name in GROUPS[group]], "not slow", tmp_path)


@pytest.mark.slow("the checks of that folder that are slow, whose reasons stand there")
def test_slow_checks_on_an_emulated_gpu(tmp_path):
    run(sorted(FOLDER.glob("check_*.py")), "slow", tmp_path)


def test_every_check_is_in_one_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(
        path.stem.removeprefix("check_") for path in FOLDER.glob("check_*.py")
    )
