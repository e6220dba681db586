"""`alignprop-fast` on the emulated GPU: trains in bf16 within a budget, resumes, samples and evaluates."""

import json

import pytest
import torch

pytestmark = pytest.mark.usefixtures("plain_kernels")


@pytest.fixture
def trained(command, tmp_path):
    out = tmp_path / "out"
    options = ("--num-inference-steps", 3, "--batch-size", 2, "--memory-budget", "18MiB")
    code, _, error = command("train", *options, "--steps", 2, "--output-dir", out)
    assert code == 0, error
    return out


def test_trains_within_the_budget_and_resumes(trained, command):
    out = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "status" in line]
    assert [line["status"] for line in steps] == ["ok", "ok"]
    assert all(0 < line["peak_bytes"] <= 18 * 2**20 for line in steps)
    code, _, error = command("train", "--resume", "--steps", 3, "--output-dir", out)
    assert code == 0, error
    assert (out / "pytorch_lora_weights.safetensors").is_file()


def test_a_gpu_that_is_too_small_is_answered_in_one_line(command, tmp_path, emulated):
    emulated.set_limit(10 * 2**20)
    try:
        code, _, error = command("train", "--num-inference-steps", 3, "--steps", 1, "--output-dir", tmp_path / "out")
    finally:
        emulated.set_limit(24 * 2**30)
    assert code == 2 and "out of memory" in error and "Traceback" not in error
    assert torch.cuda.memory_allocated() < 2**30


def test_who_names_no_budget_gets_the_fast_way_and_is_told_which(command, tmp_path):
    out = tmp_path / "out"
    options = ("--num-inference-steps", 3, "--batch-size", 2, "--truncation", "full", "--steps", 1)
    code, shown, error = command("train", *options, "--output-dir", out)
    assert code == 0, error
    # 3 % of 24 GiB stay free; the emulated device has no context, and no desktop.
    assert "memory budget 23.28 GiB: of 24.00 GiB on NVIDIA GeForce RTX 4090" in " ".join(shown.split())
    assert "3 (0-2)" in shown, "all steps are resident"
    config = (out / "config.yaml").read_text()
    assert "memory_budget: auto" in config
    # A run of the time when no budget was the default goes on as it began.
    (out / "config.yaml").write_text(config.replace("memory_budget: auto", "memory_budget: null"))
    code, shown, error = command("train", "--resume", "--steps", 2, "--output-dir", out)
    assert code == 0, error
    assert "no memory budget" in shown
