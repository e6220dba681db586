"""Options that make a command quick."""

from pathlib import Path

PROMPTS = ("--prompts", str(Path(__file__).with_name("prompts.txt")))  # two; encoding those of a set takes longer
