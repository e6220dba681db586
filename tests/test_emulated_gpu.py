"""The package on a GPU that is emulated (`emulated_gpu/emulate.py`), in processes of their own, which see no other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).with_name("emulated_gpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has CUDA of its own")
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="no g++ to build the emulated device with",
)
@pytest.mark.parametrize("checks", sorted(path.name for path in FOLDER.glob("check_*.py")))
def test_on_an_emulated_gpu(checks, tmp_path):
    command = [sys.executable, "-P", "-m", "pytest", "-p", "emulate", "-x", "--tb=short", str(FOLDER / checks)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
