"""Benchmarks, for a checkout alone: no part of the installed package. README.md says what each answers."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"
