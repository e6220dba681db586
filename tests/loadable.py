"""What people bring, in rows: the tests' own list of formats, of which docs/what-can-be-loaded.md is written.

Each test module that knows a kind of file holds a list `FORMATS` of rows and runs every one of them, so that the page
says nothing that no test has seen. `python tests/loadable.py` writes the page; a test compares it with the rows.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Answer = Literal["read exactly", "read with a note", "refused"]

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "what-can-be-loaded.md"


@dataclass(frozen=True)
class Format:
    """One kind of file or folder.

    name: what it is, in the words of those who have one; unique. answer: what the package does with it. words: a piece
    of the note, or of the refusal with its remedy, as the user sees it; empty where it is read exactly.
    """

    name: str
    answer: Answer
    words: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: its title, a sentence under it, and the test module whose rows it shows."""

    title: str
    about: str
    module: str


SECTIONS = (
    Section(
        "Models",
        "What is given as `--model`, to `load_pipeline` or to `DefaultDDPOStableDiffusionPipeline`.",
        "tests.models.load.test_what_models",
    ),
    Section(
        "Switches on a pipeline",
        "What is switched on in a pipeline that `DifferentiableSampler` or `AlignPropTrainer` gets. Read exactly: "
        "pictures and gradients are those of diffusers' own call under autograd.",
        "tests.models.test_switches",
    ),
    Section("LoRA files", "What is given as `--lora`, or to `merge`.", "tests.models.lora.test_what_loras"),
    Section("Prompts", "What is given as `--prompts`.", "tests.prompts.test_what_prompts"),
)


def formats(section: Section) -> list[Format]:
    """The rows of a section, in the order of its module.

    Raises:
        ValueError: two rows of one name.
    """
    rows: list[Format] = importlib.import_module(section.module).FORMATS
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"two formats of {section.module} have one name: {sorted(names)}")
    return rows


def page() -> str:
    """The page in Markdown."""
    sections = [section for section in SECTIONS if (ROOT / f"{section.module.replace('.', '/')}.py").is_file()]
    parts = [
        "# What can be loaded",
        "Written by `python tests/loadable.py` from the lists that the tests run through; change those. A refusal is "
        "one line and exit code 2, and nothing has been written then. Of notes and refusals a piece is shown.",
    ]
    for section in sections:
        lines = [f"| {row.name} | {row.answer} | {_cell(row.words)} |" for row in formats(section)]
        parts += [
            f"## {section.title}",
            section.about,
            "\n".join(["| what | answer | words |", "|---|---|---|", *lines]),
        ]
    return "\n\n".join(parts) + "\n"


def _cell(words: str) -> str:
    return f"`{words.replace('|', chr(92) + '|').replace('`', chr(39))}`" if words else ""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
