"""Benchmarks. They run from a checkout and are not installed. README.md says what each answers."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"
