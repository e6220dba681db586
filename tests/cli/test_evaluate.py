"""`evaluate` as a user sees it: the files it writes, and one line for all bad input."""

import json

import pytest
import torch

from alignprop_fast.models.lora.file import WEIGHTS_NAME

from .runs import QUICK, assert_refused, table

TINY = (*QUICK, "--batch-size", "3")


def test_evaluate_compares_adapters_at_several_scales(command, tiny_sd_folder, loras, tmp_path):
    code, out, err = command(
        *("evaluate", "--model", tiny_sd_folder, *TINY, "--prompts", loras / "prompts.txt", "--images-per-prompt", 2),
        *("--heldout-prompts", loras / "heldout.txt", "--reward", "colorfulness:2,compressibility", "--seed", 7),
        *("--lora", loras / "first", "--lora", loras / "second" / WEIGHTS_NAME),
        *("--scale", 0, "--scale", 0.5, "--scale", 1, "--output-dir", tmp_path / "out"),
    )
    assert (code, err) == (0, "")
    assert "gained" in out and "diversity, heldout (1)" in out and "30/30 pictures" in out
    names = {"evaluation.csv", "summary.csv", "grid.png", "grid_heldout.png", "reward_by_scale.png", "settings.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["seed"], settings["scale"]) == (7, [0, 0.5, 1])
    assert settings["reward"] == "colorfulness:2,compressibility"
    assert settings["versions"]["torch"] == torch.__version__
    rows = table(tmp_path / "out" / "evaluation.csv")
    adapters = [(name, scale) for name in ("first", "pytorch_lora_weights") for scale in ("0.5", "1.0")]
    variants = [("base", "0.0"), *adapters]
    assert list(dict.fromkeys((row["adapter"], row["scale"]) for row in rows)) == variants
    assert len(rows) == 5 * (4 + 2) * 3
    # Each picture of a prompt has its own seed, and both sets count from --seed.
    base = [row for row in rows if row["adapter"] == "base" and row["part"] == "reward"]
    assert [(row["prompt"], row["seed"]) for row in base] == [
        *(("a cat", "7"), ("a cat", "8"), ("a dog", "9"), ("a dog", "10"), ("a fish", "7"), ("a fish", "8"))
    ]
    values = {(r["adapter"], r["scale"], r["prompt"], r["seed"], r["part"]): float(r["value"]) for r in rows}
    for (*where, part), value in values.items():
        if part == "reward":
            parts = [values[*where, name] for name in ("colorfulness", "compressibility")]
            assert value == pytest.approx(2 * parts[0] + parts[1], rel=1e-5)
    assert len({f"{values[*variant, 'a cat', '7', 'reward']:.4f}" for variant in variants}) == 5


def test_other_batches_give_the_same_rewards(command, tiny_sd_folder, loras, tmp_path):
    common = ("--model", tiny_sd_folder, *TINY, "--prompts", loras / "prompts.txt", "--reward", "colorfulness")
    rewards = []
    for size in (3, 1):
        out = tmp_path / str(size)
        own = ("--images-per-prompt", 2, "--batch-size", size, "--output-dir", out)
        code, _, err = command("evaluate", *common, *own)
        assert (code, err) == (0, "") and not (out / "reward_by_scale.png").exists()
        rewards.append([float(row["value"]) for row in table(out / "evaluation.csv") if row["part"] == "reward"])
    assert len(rewards[0]) == 4 and rewards[0] == pytest.approx(rewards[1], rel=1e-3)


def test_evaluate_on_the_bundled_model(command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\na cat\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--num-inference-steps", 4, "--device", "cpu")
    code, out, err = command("evaluate", *arguments, "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "") and "no diversity" in out
    (row,) = table(tmp_path / "out" / "summary.csv")
    assert (row["part"], row["count"], row["adapter"]) == ("reward", "2", "base")
    assert 0.2 < float(row["mean"]) <= 1, "the bundled CLIP knows what the bundled model draws"
    # `sample` draws exactly the pictures that were scored.
    code, _, _ = command("sample", *arguments, "--output-dir", tmp_path / "samples")
    assert code == 0 and (tmp_path / "samples" / "001_a-cat_seed1.png").is_file()


BAD = {
    "no adapter": (["--lora", "{loras}/none"], "give a LoRA file"),
    "damaged adapter": (["--lora", "{loras}/cut"], "damaged"),
    "foreign adapter": (["--lora", "{loras}/foreign.safetensors"], "do not fit this model"),
    "adapter twice": (["--lora", "{loras}/first", "--lora", "{loras}/first/"], "same adapters twice"),
    "scale of nothing": (["--scale", "0.5"], "give some with --lora"),
    "scale of no size": (["--lora", "{loras}/first", "--scale", "nan"], "--scale must be a number"),
    "no pictures": (["--images-per-prompt", "0"], "--images-per-prompt"),
    "empty prompts": (["--heldout-prompts", "{loras}/empty.txt"], "holds no prompts"),
    "unknown reward": (["--reward", "colourfulness"], "did you mean"),
    "diversity of one": (["--diversity-model", "{loras}"], "add --images-per-prompt"),
    "no diversity model": (["--diversity-model", "{loras}", "--images-per-prompt", "2"], "no CLIP model"),
    "odd size": (["--height", "13"], "multiple of 8"),
    "no model": (["--model", "{loras}/none"], "no model folder"),
    "used folder": (["--output-dir", "{loras}"], "not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, loras, tiny_sd_folder, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, remedy = BAD[case]
    given = [argument.replace("{loras}", str(loras)) for argument in arguments]
    common = ("--model", tiny_sd_folder, *TINY, "--prompts", loras / "prompts.txt", "--output-dir", tmp_path / "out")
    assert_refused(command, loras, tmp_path, ("evaluate", *common, "--reward", "colorfulness", *given), remedy)
