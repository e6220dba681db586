"""Prompts with metadata in the commands: rewards get the row of each prompt, and cut texts are logged once."""

import json
import sys

import pytest
import yaml
from PIL import Image

TINY = ("--num-inference-steps", "1", "--batch-size", "2", "--device", "cpu")
WEIGHTS = "pytorch_lora_weights.safetensors"
LONG = "the red cat " * 40
REWARD = """
def score(images, prompts, metadata):
    # Raises KeyError where the metadata is not there, and AssertionError where it is another row's.
    assert all(row["of"] == prompt for prompt, row in zip(prompts, metadata, strict=True)), (prompts, metadata)
    seen.update(row["target"] for row in metadata)
    return sum(images.mean(dim=(1, 2, 3)) * row["target"] for row in metadata) / len(metadata), {}
seen = set()
def spoils(images, prompts, metadata):
    found = score(images, prompts, metadata)
    for row in metadata:
        row.clear()  # which must not reach the next batch
    return found
"""


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A .jsonl file of four prompts, one with line breaks and one too long, and a reward that needs their metadata."""
    prompts = ["a cat", "a dog\non a\u2028mat | with `ticks`", LONG, 'two, "big" apples']
    lines = [json.dumps({"prompt": prompt, "target": i, "of": prompt}) for i, prompt in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "metadata_of_test.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "rows.jsonl"
    sys.modules.pop("metadata_of_test", None)


def seen():
    found = set(sys.modules["metadata_of_test"].seen)
    sys.modules["metadata_of_test"].seen.clear()
    return found


@pytest.mark.slow("trains, and resumes the training")
def test_training_watching_and_resuming_with_metadata(command, tiny_sd_folder, rows, tmp_path):
    options = ("--model", tiny_sd_folder, "--reward", "metadata_of_test:score", "--prompts", rows, *TINY)
    options = (*options, "--learning-rate", "1e-2", "--sample-every", 2, "--negative-prompt", "blurry |\ndark")
    options = (*options, "--watch-prompts", rows, "--watch-pictures", 8)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, printed, err = command("train", *options, "--steps", 2, "--output-dir", whole)
    assert (code, err) == (0, "") and seen() == {0, 1, 2, 3}
    told = " ".join(printed.split())
    assert told.count("longer than the text encoder reads") == 1
    assert "prompts longer than the text encoder reads: 1 of 4;" in told
    assert "CLIP reads 77 of its 122 tokens, nothing from 'the red cat the red cat the red cat the" in told
    assert command("train", *options, "--steps", 1, "--output-dir", parts)[0] == 0
    code, _, err = command("train", "--resume", "--steps", 2, "--output-dir", parts)
    assert (code, err) == (0, "")
    for name in (WEIGHTS, "samples/step_0002.png", "before_after.png"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    listed = next(line for line in (whole / "README.md").read_text().splitlines() if "prompts were trained on" in line)
    assert "a cat; a dog on a mat | with" in listed
    assert "| negative_prompt | blurry \\| dark |" in (whole / "README.md").read_text()


def test_a_set_is_meant_where_a_file_or_folder_has_its_name(command, tiny_sd_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals").mkdir()
    (tmp_path / "demo-heldout").write_text("another prompt\n")
    out, options = tmp_path / "out", ("--prompts", "animals", "--watch-prompts", "demo-heldout", "--watch-pictures", 2)
    options = ("--model", tiny_sd_folder, "--reward", "colorfulness", *options, *TINY)
    code, _, err = command("train", *options, "--steps", 1, "--output-dir", out)
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert (code, err, kept["prompts"], kept["watch_prompts"]) == (0, "", "animals", "demo-heldout")
    assert command("train", "--resume", "--steps", 2, "--output-dir", out)[::2] == (0, "")


def test_a_reward_that_needs_metadata_is_measured_with_some(command, tiny_sd_folder, rows, tmp_path):
    """A memory budget is settled before the first prompt is drawn."""
    options = ("--model", tiny_sd_folder, "--reward", "metadata_of_test:score", "--prompts", rows, *TINY)
    code, _, err = command("train", *options, "--memory-budget", "1MiB", "--output-dir", tmp_path / "out")
    assert code == 2 and "leanest plan needs" in err and seen() == {0}


def test_evaluating_and_mixing_with_metadata(command, tiny_sd, tiny_sd_folder, rows, tmp_path):
    from alignprop_fast.models.lora.adapters import add_lora
    from alignprop_fast.models.lora.load_save import save_lora

    add_lora(tiny_sd, 2, 2.0, "attention")
    for name in ("one", "two"):
        save_lora(tiny_sd, tmp_path / name)
    options = ("--model", tiny_sd_folder, "--reward", "metadata_of_test:spoils", "--prompts", rows, *TINY)
    code, printed, err = command(
        "evaluate", *options, "--lora", tmp_path / "one", "--heldout-prompts", rows, "--output-dir", tmp_path / "e"
    )
    assert (code, err) == (0, "") and seen() == {0, 1, 2, 3}
    assert " ".join(printed.split()).count("longer than the text encoder reads: 1 of 4;") == 1
    code, printed, err = command(
        *("merge", tmp_path / "one", tmp_path / "two", *options, "--path-steps", 2, "--output-dir", tmp_path / "m")
    )
    assert (code, err) == (0, "") and seen() == {0, 1, 2, 3} and (tmp_path / "m" / "path.csv").is_file()
    assert " ".join(printed.split()).count("longer than the text encoder reads: 1 of 4;") == 1


def test_samples_of_a_csv_file(command, tiny_sd_folder, tmp_path):
    """Header and quotes are not prompts, and negative prompts are cut too."""
    (tmp_path / "p.csv").write_text('prompt,target\n"a ""red"" cat, on a mat",1\n"a dog\nasleep",2\n')
    code, printed, err = command(
        *("sample", "--model", tiny_sd_folder, "--prompts", tmp_path / "p.csv", "--output-dir", tmp_path / "s", *TINY),
        *("--negative-prompt", LONG),
    )
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (tmp_path / "s").glob("0*.png"))
    assert names == ["000_a-red-cat-on-a-mat_seed0.png", "001_a-dog-asleep_seed1.png"]
    told = " ".join(printed.split())
    assert "negative prompts longer than the text encoder reads: 1 of 1;" in told and told.count("longer than") == 1
    with Image.open(tmp_path / "s" / "grid.png") as grid:
        assert grid.width > 0


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("p.tsv", "prompt\n", ".csv"),
        ("p.csv", "caption\na cat\n", "no column 'prompt'"),
        ("p.jsonl", '{"prompt": 3}\n', "not text"),
    ],
)
def test_a_refused_file_is_one_line_and_leaves_nothing(command, tiny_sd_folder, tmp_path, file, content, words):
    (tmp_path / file).write_text(content)
    for name in ("train", "sample", "evaluate"):
        out = tmp_path / name
        code, _, err = command(
            name, "--model", tiny_sd_folder, "--prompts", tmp_path / file, "--output-dir", out, "--device", "cpu"
        )
        assert code == 2 and len(err.splitlines()) == 1 and words in err and not out.exists()


def test_the_draws_of_prompts_are_those_of_texts_alone(tmp_path):
    """Rows use the same random numbers as texts did, so an older run is resumed to the same end."""
    import random

    from alignprop_fast.prompts.rows import load_prompts, load_rows

    state = random.getstate()
    texts = [random.choice(load_prompts("animals")) for _ in range(50)]
    random.setstate(state)
    assert [random.choice(load_rows("animals")).prompt for _ in range(50)] == texts
