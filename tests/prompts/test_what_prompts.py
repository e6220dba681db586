"""Files of prompts as people have them: what is read from each, and how the others are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from alignprop_fast.prompts.rows import PromptRow, load_rows

from ..loadable import Format

ROWS = [PromptRow("a red cat, on a mat", {"target": 3, "tags": ["x"]}), PromptRow('a "big"\ndog', {"target": 5})]
TEXTS = [PromptRow(row.prompt, {"target": str(row.metadata["target"])}) for row in ROWS]


@dataclass(frozen=True)
class Case:
    """A format, the file of the test, what is in it, and the rows that are to be read.

    content: bytes, or what writes the file (or folder). library: that the format needs.
    """

    format: Format
    file: str
    content: bytes | str | Callable[[Path], Any]
    rows: list[PromptRow] | None = None
    library: str | None = None


def read(name: str, file: str, content: Any, rows: list[PromptRow]) -> Case:
    return Case(Format(name, "read exactly"), file, content, rows, _library(file))


def refused(name: str, file: str, content: Any, words: str) -> Case:
    return Case(Format(name, "refused", words), file, content, None, _library(file))


def _library(file: str) -> str | None:
    return "datasets" if file in ("p.parquet", "p.saved") else None


def save(path: Path, rows: list[PromptRow] | None = None, name: str = "prompt", sets: tuple[str, ...] = ()) -> None:
    """By datasets, in the form that the path's suffix says."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    kept = ("target", "tags")
    rows = ROWS if rows is None else rows
    columns = {name: [row.prompt for row in rows], **{k: [row.metadata.get(k) for row in rows] for k in kept}}
    data = Dataset.from_dict(columns)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        (DatasetDict({name: data for name in sets}) if sets else data).save_to_disk(path)


SAVED = [ROWS[0], PromptRow(ROWS[1].prompt, {"target": 5, "tags": None})]
CSV = 'prompt,target\n"a red cat, on a mat",3\n"a ""big""\ndog",5\n'
JSON_LINES = """{"prompt": "a red cat, on a mat", "target": 3, "tags": ["x"]}

{"target": 5, "prompt": "a \\"big\\"\\ndog"}
"""
PLAIN = "# mine\n\n  a café at night\r\na cat # really\ra\u2028b\x85c\x0bd\x0ce\x1cf\n"
LINES = [PromptRow("a café at night"), PromptRow("a cat # really"), PromptRow("a\u2028b\x85c\x0bd\x0ce\x1cf")]

OTHER = "is not a kind of file that can hold prompts: give a .txt file with one prompt per line"
TABLE = "like a table or JSON: give a .csv or .jsonl file with the texts as 'prompt'"
NO_COLUMN, QUOTES = "has no column 'prompt'", "put texts with commas or line breaks in quotes"
FORM = 'write one object per line, such as {"prompt": "a cat"}'

CASES = [
    read("prompts as text, one a line", "p.txt", PLAIN, LINES),
    read("prompts as text in UTF-8 with its mark", "p.txt", "\ufeff" + PLAIN, LINES),
    read("prompts as text in UTF-16, as PowerShell writes it", "p.txt", PLAIN.encode("utf-16"), LINES),
    read("prompts in a file without a suffix", "prompts", PLAIN, LINES),
    read("prompts as CSV, with metadata", "p.CSV", CSV, TEXTS),
    read("prompts as CSV with Windows' line ends", "p.csv", "\ufeff" + CSV.replace("3\n", "3\r\n\r\n"), TEXTS),
    read("a CSV prompt that begins with #", "p.csv", "prompt\n#cute cat\n", [PromptRow("#cute cat")]),
    read("prompts as JSON Lines, with metadata", "p.jsonl", JSON_LINES, ROWS),
    read("JSON Lines with U+2028 in a text", "p.jsonl", '{"prompt": "a\u2028b\x85c"}\n', [PromptRow("a\u2028b\x85c")]),
    read("prompts as Parquet, with metadata", "p.parquet", save, SAVED),
    read("a folder written by save_to_disk of datasets", "p.saved", save, SAVED),
    read("a DatasetDict with one set", "p.saved", partial(save, sets=("train",)), SAVED),
    refused("a DatasetDict with several sets", "p.saved", partial(save, sets=("a", "b")), "give the folder of one of"),
    refused("a datasets folder without a column prompt", "p.saved", partial(save, name="text"), NO_COLUMN),
    refused("a datasets folder with nothing in it", "p.saved", partial(save, rows=[]), "is empty, damaged or"),
    refused("a Parquet file without a column prompt", "p.parquet", partial(save, name="text"), NO_COLUMN),
    refused("a Parquet file that is cut short", "p.parquet", b"PAR1\0\0", "is not a complete Parquet file: write it"),
    refused("prompts as JSON", "p.json", '["a cat"]', OTHER),
    refused("prompts as TSV", "p.tsv", "prompt\ta cat\n", OTHER),
    refused("prompts as YAML", "p.yaml", "- a cat\n", OTHER),
    refused("a spreadsheet of prompts", "p.xlsx", b"PK\3\4", OTHER),
    refused("a PDF of prompts", "p.pdf", b"%PDF-1.7", OTHER),
    refused("a picture for prompts", "p.png", b"\x89PNG\r\n\x1a\n", OTHER),
    refused("a folder of pictures and captions", "pictures", Path.mkdir, "was not written by save_to_disk of datasets"),
    refused("prompts with NUL bytes", "p.txt", b"a cat\0a dog\n", "is a binary file"),
    refused("prompts as text in another encoding", "p.txt", "caf\u00e9".encode("latin-1"), "save it as UTF-8"),
    refused("a CSV file that is called .txt", "p.txt", CSV, TABLE),
    refused("JSON Lines that are called .txt", "p.txt", JSON_LINES, TABLE),
    refused("a CSV file called .txt, the texts not first", "p.txt", "id,prompt\n1,a cat\n", TABLE),
    refused("a JSON list that is called .txt", "p.txt", '["a cat", "a dog"]\n', TABLE),
    refused("a CSV file without a column prompt", "p.csv", "caption,target\na cat,3\n", NO_COLUMN),
    refused("a CSV file with semicolons", "p.csv", "prompt;target\na cat;3\n", NO_COLUMN),
    refused("a CSV file with a column twice", "p.csv", "prompt,prompt\na,b\n", "has a column twice"),
    refused("a CSV prompt with a comma and no quotes", "p.csv", "prompt,n\na red cat, on a mat,3\n", QUOTES),
    refused("a CSV row that is too short", "p.csv", "prompt,n\na cat\n", "has 1 fields, not 2"),
    refused("a CSV text whose quotes do not end", "p.csv", 'prompt\n"a cat\n', QUOTES),
    refused("a CSV row without a prompt", "p.csv", "prompt,n\n ,3\n", "is empty: write one, or leave the row out"),
    refused("a CSV file with a header alone", "p.csv", "prompt,target\n", "holds no prompts: write at least one"),
    refused("an empty CSV file", "p.csv", "", NO_COLUMN),
    refused("an empty JSON Lines file", "p.jsonl", "\n", "holds no prompts: write at least one"),
    refused("JSON over several lines", "p.jsonl", '{\n"prompt": "a cat"\n}\n', FORM),
    refused("JSON Lines of texts alone", "p.jsonl", '"a cat"\n', FORM),
    refused("JSON Lines without prompts", "p.jsonl", '{"text": "a cat"}\n', FORM),
    refused("JSON Lines with a name twice", "p.jsonl", '{"prompt": "a", "prompt": "b"}\n', "a name appears twice"),
    refused("a number as a prompt", "p.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n', "is 5, not text: put it in"),
    refused("null as a prompt", "p.jsonl", '{"prompt": null}\n', "is None, not text"),
    refused("NaN as a prompt", "p.jsonl", '{"prompt": NaN}\n', "is nan, not text"),
    refused("half a character in a prompt", "p.jsonl", '{"prompt": "\\ud83d"}\n', "holds half a character"),
]
TOO_LONG = Format("a prompt longer than the text encoder reads", "read with a note", "nothing from 'the red cat the")
FORMATS = [*(case.format for case in CASES), TOO_LONG]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.format.name)
def test_a_file_is_read_exactly_or_refused_in_one_line(tmp_path, case):
    path = tmp_path / case.file
    if case.library is not None:
        pytest.importorskip(case.library)
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content.encode() if isinstance(case.content, str) else case.content)
    if case.rows is not None:
        assert load_rows(path) == load_rows(str(path)) == case.rows
        return
    with pytest.raises(ValueError) as caught:
        load_rows(path)
    assert case.format.words in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_prompt_that_is_too_long_is_read_with_a_note(tiny_sd, caplog):
    from alignprop_fast import DifferentiableSampler

    DifferentiableSampler(tiny_sd, 1)(["the red cat " * 40])
    assert [TOO_LONG.words in record.getMessage() for record in caplog.records if "alignprop" in record.name] == [True]


@pytest.mark.parametrize(
    "begin",
    [
        *(
            "caption,score",
            "text;prompt",
            "Image URL,Prompt",
            "prompt,image url",
            '"id", "caption"',
            "image|text",
            "TEXT",
        ),
        *(",prompt", "id\tcaptions", "[", '[{"prompt": "a cat"}]', '["a cat",', "{", "[]"),
    ],
)
def test_a_text_file_that_begins_as_something_else_is_refused(tmp_path, begin):
    (tmp_path / "p.txt").write_text(f"# mine\n{begin}\na cat\n")
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path / "p.txt")
    assert TABLE in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "begin",
    [
        *(
            "a caption, of a cat",
            "text, written on a wall",
            "a poster; text: hello",
            "captioned, cat",
            "a prompt, a text",
        ),
        *("[cat:dog:0.5] on a mat", "((cat)), [[dog]]", "{{cat}}", "{red|blue} cat", '"text" in neon', "cat | dog"),
    ],
)
def test_prompts_with_commas_and_brackets_are_read(tmp_path, begin):
    (tmp_path / "p.txt").write_text(f"{begin}\nid,prompt\n")
    assert [row.prompt for row in load_rows(tmp_path / "p.txt")] == [begin, "id,prompt"]


@pytest.mark.parametrize("file", ["p.parquet", "p.saved"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, file):
    path = tmp_path / file
    if file == "p.saved":
        path.mkdir()
        (path / "state.json").write_text("{}")
    else:
        path.write_bytes(b"PAR1")
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install datasets") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)
