"""A run with a moving average draws, watches, keeps and writes the average, and also writes the last adapters."""

import json
import shutil

import pytest
from safetensors.torch import load_file

WEIGHTS = "pytorch_lora_weights.safetensors"
TINY = ("--num-inference-steps", 2, "--batch-size", 2, "--device", "cpu")
# High enough that the pictures of the average and of the last adapters differ.
AVERAGED = ("--learning-rate", "5e-2", "--lr-scheduler", "cosine", "--ema-decay", 0.5, "--sample-every", 2)

WATCHED = """
def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)), {}
"""


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red\na dog\n")
    return path


@pytest.fixture
def picture(command, prompts, tiny_sd_folder, tmp_path):
    """The first sample picture, drawn by `sample` with the adapters in a folder."""

    def drawn(lora):
        out = tmp_path / f"pictures of {lora.name}"
        options = ("--model", tiny_sd_folder, "--lora", lora, "--prompts", prompts, "--output-dir", out)
        code, _, err = command("sample", *options, *TINY)
        assert (code, err) == (0, "")
        return min(out.glob("000_*_seed0.png")).read_bytes()

    return drawn


def test_pictures_are_those_of_the_average_which_lies_in_a_folder(
    command, picture, prompts, tiny_sd, tiny_sd_folder, tmp_path
):
    out = tmp_path / "out"
    options = ("--model", tiny_sd_folder, "--prompts", prompts, "--reward", "colorfulness", *TINY, *AVERAGED)
    code, printed, err = command("train", *options, "--steps", 3, "--output-dir", out)
    assert (code, err) == (0, "") and "lr 0.0" in printed
    assert {path.name for path in (out / "ema").iterdir()} == {WEIGHTS, "kohya_lora_weights.safetensors"}
    last, average = load_file(out / WEIGHTS), load_file(out / "ema" / WEIGHTS)
    assert last.keys() == average.keys() and any((last[name] != average[name]).any() for name in last)
    shown = (out / "samples" / "step_0003" / "00.png").read_bytes()
    assert picture(out / "ema") == shown != picture(out)
    tiny_sd.load_lora_weights(out / "ema")
    assert "`ema/` holds the moving average" in (out / "README.md").read_text()
    rates = [json.loads(line)["learning_rate"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([5e-2, 3.75e-2, 1.25e-2])  # 1 + cos(pi k / 3), halved


def test_a_run_resumed_without_the_average_leaves_no_old_one(command, prompts, tiny_sd_folder, tmp_path):
    """What others put beside it stays."""
    out, shared = tmp_path / "out", tmp_path / "shared"
    options = ("--model", tiny_sd_folder, "--prompts", prompts, "--reward", "colorfulness", *TINY, *AVERAGED)
    code, printed, _ = command("train", *options, "--steps", 1, "--output-dir", out)
    assert code == 0 and "ema; the pictures were drawn with it" in printed
    shutil.copytree(out, shared)
    (shared / "ema" / "notes.txt").touch()
    for folder in (out, shared):
        code, printed, err = command("train", "--resume", "--ema-decay", 0, "--steps", 2, "--output-dir", folder)
        assert (code, err) == (0, "") and "average:" not in printed
        assert "`ema/`" not in (folder / "README.md").read_text()
    assert not (out / "ema").exists()
    assert [path.name for path in (shared / "ema").iterdir()] == ["notes.txt"]


def test_early_stopping_keeps_the_average(command, picture, prompts, tiny_sd_folder, tmp_path, monkeypatch):
    (tmp_path / "watched_average.py").write_text(WATCHED)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    options = ("--model", tiny_sd_folder, "--prompts", prompts, "--reward", "colorfulness", *TINY, *AVERAGED)
    watch = ("--watch-reward", "watched_average:brightness", "--watch-prompts", prompts, "--watch-pictures", 2)
    keep = ("--patience", 1, "--max-drop", 9)  # larger than any drop of brightness, so the last adapters are kept
    code, printed, err = command("train", *options, *watch, *keep, "--steps", 3, "--output-dir", out)
    assert (code, err) == (0, "") and "done after step 3: the adapters of step 2 are kept" in printed
    assert not (out / "ema").exists()
    assert picture(out) == (out / "samples" / "step_0002" / "00.png").read_bytes()
    lines = [json.loads(line) for line in (out / "samples" / "samples.jsonl").read_text().splitlines()]
    means = {line["step"]: line["reward_mean"] for line in lines}
    assert f"| reward | {means[0]:.3f} | {means[2]:.3f} |" in (out / "README.md").read_text()
