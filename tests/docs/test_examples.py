"""Each script of docs/examples runs, and shows what it says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

# torchrun's own launcher, with processes that share what was imported before.
TWO_PROCESSES = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
sys.path.insert(0, sys.argv[1])
import two_processes
config = LaunchConfig(1, 1, 2, start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
elastic_launch(config, two_processes.main)(sys.argv[2])
"""


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_own_reward(tmp_path):
    rewards = example("own_reward").main(str(tmp_path))
    assert len(rewards) == 3
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_few_steps():
    rewards = example("few_steps").main()
    assert rewards[-1] > rewards[0]  # the same noise at every step


@pytest.mark.slow("trains three adapters")
def test_three_merged(tmp_path):
    found = example("three_merged").main(str(tmp_path), steps=2)
    assert found["colorfulness"]["colorfulness"] > found["base"]["colorfulness"]
    assert found["base"] != found["mixed"]
    assert (tmp_path / "mixed" / "kohya_lora_weights.safetensors").is_file()


@pytest.mark.slow("starts two processes that train")
def test_two_processes(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, str(EXAMPLES), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]  # one process prints
    assert all("over 2 processes" in line for line in lines)
    assert (tmp_path / "checkpoints").is_dir()


def test_every_example_is_tested():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {file.stem for file in EXAMPLES.glob("*.py")} <= tests


def test_the_page_shows_every_script():
    page = (EXAMPLES / "README.md").read_text()
    assert all(f'\n--8<-- "examples/{script.name}"\n' in page for script in EXAMPLES.glob("*.py"))
