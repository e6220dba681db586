"""Quick runs of commands: their options, and what they leave in a folder."""

import json
from pathlib import Path

PROMPTS = ("--prompts", str(Path(__file__).with_name("prompts.txt")))  # two; encoding those of a set takes longer
TINY = ("--num-inference-steps", "2", "--batch-size", "2", "--device", "cpu", *PROMPTS)
WEIGHTS = "pytorch_lora_weights.safetensors"


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
