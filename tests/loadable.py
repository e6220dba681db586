"""What people bring, in rows: the tests' own list of formats, of which docs/what-can-be-loaded.md is written.

Each test module that knows a kind of file holds a list `FORMATS` of rows and runs every one of them, so that the page
says nothing that no test has seen. `python tests/loadable.py` writes the page; a test compares it with the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Answer = Literal["read exactly", "read with a note", "refused"]


@dataclass(frozen=True)
class Format:
    """One kind of file or folder.

    name: what it is, in the words of those who have one; unique. answer: what the package does with it. words: a piece
    of the note, or of the refusal with its remedy, as the user sees it; empty where it is read exactly.
    """

    name: str
    answer: Answer
    words: str = ""
