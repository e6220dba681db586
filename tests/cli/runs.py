"""Quick runs of commands: their options, and what they leave in a folder."""

import csv
import json
from pathlib import Path

PROMPTS = ("--prompts", str(Path(__file__).with_name("prompts.txt")))  # two; encoding those of a set takes longer
QUICK = ("--num-inference-steps", "2", "--device", "cpu")
TINY = (*QUICK, "--batch-size", "2", *PROMPTS)
WEIGHTS = "pytorch_lora_weights.safetensors"


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def assert_refused(command, loras, folder, arguments, remedy):
    """The command ends in one line on stderr with the remedy, and has written to neither folder."""
    before = snapshot(loras)
    code, _, err = command(*arguments)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("alignprop-fast: ") and remedy in err
    assert snapshot(loras) == before and not list(folder.iterdir())
