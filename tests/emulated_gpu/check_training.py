"""`alignprop-fast` on the emulated GPU: trains in bf16 within a budget, resumes, samples and evaluates."""

import json

import pytest
import torch

from alignprop_fast.demo import clip_path

pytestmark = pytest.mark.usefixtures("plain_kernels", "steady_clock")


@pytest.fixture
def tiny(tiny_sd_folder):
    """Options for a model that is smaller than the bundled one, with the same reward."""
    return "--model", tiny_sd_folder, "--reward", "clip", "--reward-model", clip_path()


@pytest.fixture
def trained(command, tmp_path):
    out = tmp_path / "out"
    options = ("--num-inference-steps", 3, "--batch-size", 2, "--memory-budget", "18MiB")
    options = (*options, "--lr-scheduler", "cosine", "--ema-decay", 0.9)  # the average is on the device too
    code, _, error = command("train", *options, "--steps", 2, "--output-dir", out)
    assert code == 0, error
    return out


@pytest.mark.slow("measures the bundled model")
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


@pytest.fixture
def deterministic(monkeypatch):
    """Restores torch."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_deterministic_turns_torch_s_mode_on_and_gives_the_same_bytes(command, tmp_path, tiny, deterministic):
    options = (*tiny, "--num-inference-steps", 3, "--batch-size", 1, "--steps", 2, "--memory-budget", "none")
    files = []
    for name in ("one", "two"):
        code, _, error = command("train", *options, "--deterministic", "--output-dir", tmp_path / name)
        assert code == 0, error
        assert torch.are_deterministic_algorithms_enabled()
        files.append((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes())
    assert files[0] == files[1]


def test_deterministic_is_refused_where_it_comes_too_late(command, tmp_path, monkeypatch):
    """CUDA has started already, as the emulated one has."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    code, _, error = command("train", "--steps", 1, "--deterministic", "--output-dir", tmp_path / "out")
    assert code == 2 and "CUBLAS_WORKSPACE_CONFIG=:4096:8" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(7, 40), (50, 9)])
def test_the_deterministic_resize_is_the_same(emulated, deterministic, mode, size):
    from alignprop_fast.rewards.preprocess import _interpolate

    images = torch.rand(2, 3, 31, 23, generator=torch.Generator().manual_seed(0)).to("cuda")
    plain = _interpolate(images, size, mode)
    torch.use_deterministic_algorithms(True)
    ours = _interpolate(images, size, mode)
    # Sums of fp32 in another order, of values up to 1.
    assert (ours - plain).abs().max() <= 1e-5 and not torch.equal(ours, plain)


def test_who_names_no_budget_gets_the_fast_way_and_is_told_which(command, tmp_path, tiny):
    out = tmp_path / "out"
    options = (*tiny, "--num-inference-steps", 3, "--batch-size", 2, "--truncation", "full", "--steps", 1)
    code, shown, error = command("train", *options, "--output-dir", out)
    assert code == 0, error
    # 3 % of 24 GiB stays free; the emulated device has no context and no desktop.
    assert "memory budget 23.28 GiB: of 24.00 GiB on NVIDIA GeForce RTX 4090" in " ".join(shown.split())
    assert "3 (0-2)" in shown, "all steps are resident"
    config = (out / "config.yaml").read_text()
    assert "memory_budget: auto" in config
    # A run from the time when the default was no budget continues without one.
    (out / "config.yaml").write_text(config.replace("memory_budget: auto", "memory_budget: null"))
    code, shown, error = command("train", "--resume", "--steps", 2, "--output-dir", out)
    assert code == 0, error
    assert "no memory budget" in shown
