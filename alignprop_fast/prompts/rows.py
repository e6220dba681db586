"""Prompts of a named set or from a file, each with the other fields of its row."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MAX_PROMPT_LENGTH = 1000  # characters; text encoders read 77 tokens, so a longer line means another kind of file

_PROMPTS = Path(__file__).parent
_DEMO = _PROMPTS.parent / "demo"
_FILES = {
    "demo": _DEMO / "prompts.txt",
    "demo-heldout": _DEMO / "prompts_heldout.txt",
    "same-colour": _DEMO / "same_colour.txt",
    "same-colour-heldout": _DEMO / "same_colour_heldout.txt",
    "animals": _PROMPTS / "animals.txt",
    "animals-heldout": _PROMPTS / "animals_heldout.txt",
    "general": _PROMPTS / "general.txt",
}
PROMPT_SETS = tuple(_FILES)
KINDS = (
    "a .txt file with one prompt per line, or a .csv, .jsonl or .parquet file or datasets folder with a column 'prompt'"
)
_PROMPT = "prompt"
_JSON = re.compile(r'[\[{][\[{\s]*("|$|])')  # how files of JSON begin
_PROMPT_COLUMNS = {"prompt", "prompts"}
_TEXT_COLUMNS = {"text", "texts", "caption", "captions"}  # words that can also be tags


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and the other fields of its row, for the reward."""

    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


_Records = Iterator[tuple[str, Mapping[str, Any]]]  # where a record stands ("line 3"), and its fields


def spread(items: Sequence[T], count: int, repeat: bool = False) -> list[T]:
    """`count` items at even distances in the list. A shorter list is taken whole, or repeated if `repeat`."""
    if len(items) >= count:
        return [items[i * len(items) // count] for i in range(count)]
    return [items[i % len(items)] for i in range(count if repeat else len(items))]


def load_prompts(spec: str | Path) -> list[str]:
    """The prompts of `load_rows`, without the rows' other fields."""
    return [row.prompt for row in load_rows(spec)]


def load_rows(spec: str | Path) -> list[PromptRow]:
    """Prompts of a built-in set, a file or a folder, in its order; the other fields of a row are its metadata.

    Sets: "demo" and "demo-heldout" (things the bundled model can draw), "same-colour" and "same-colour-heldout" (things
    on a background of their own colour), "animals" and "animals-heldout" (the 45 animals
    that DDPO and AlignProp train on, and the 6 that AlignProp holds out), "general" (62 scenes, objects, counts, places
    and styles of our own writing). No prompt is in a set and in its held-out set.

    Files, text in UTF-8 or (with its mark) UTF-16:
        .txt: one prompt per line. Blank lines and lines that begin with # are skipped. A line ends only where an editor
            shows its end (\\n, \\r\\n, \\r).
        .csv: commas, column names in the first line; texts with commas or line breaks in quotes. Fields are texts.
        .jsonl: one object per line, such as {"prompt": "a cat", "target": 3}.
        .parquet, and a folder written by `save_to_disk` of `datasets` (one set): need that package.

    Raises:
        FileNotFoundError: there is no such set or file.
        ValueError: the file is of another kind or has no prompts, or the prompt of a row is missing or not a text.
    """
    path = _FILES[str(spec)] if spec in _FILES else Path(spec).expanduser()
    if not os.path.exists(path):  # of a text too long for a file name Path says that it is too long
        raise FileNotFoundError(f"no prompts file {path}: give {KINDS}, or a set: {', '.join(PROMPT_SETS)}")
    read = _dataset if path.is_dir() else _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path} is not a kind of file that can hold prompts: give {KINDS}")
    rows = [_row(f"{where} of {path}", fields) for where, fields in read(path)]
    if not rows:
        raise ValueError(f"{path} holds no prompts: write at least one (blank lines and # comments do not count)")
    return rows


def _row(where: str, fields: Mapping[str, Any]) -> PromptRow:
    prompt = fields[_PROMPT]
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt in {where} is {str(prompt)[:40]}, not text: put it in quotes, or leave it out")
    if not prompt.strip():
        raise ValueError(f"the prompt in {where} is empty: write one, or leave the row out")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"the prompt in {where} holds half a character (\\ud800 to \\udfff): write it again")
    return PromptRow(prompt, {name: value for name, value in fields.items() if name != _PROMPT})


def _text(path: Path) -> str:
    content = path.read_bytes()
    with_mark = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if with_mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8, or give {KINDS}") from error
    if "\0" in text:
        raise ValueError(f"{path} is a binary file: give {KINDS}")
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without line breaks. `str.splitlines` would also split at U+2028, U+0085 or a form feed."""
    return enumerate((line.rstrip("\n") for line in io.StringIO(_text(path), newline=None)), start=1)


def _text_records(path: Path) -> _Records:
    first = True
    for number, line in _lines(path):
        prompt = line.strip()
        if len(prompt) > MAX_PROMPT_LENGTH:
            raise ValueError(
                f"line {number} of {path} has {len(prompt)} characters: write one prompt of at most "
                f"{MAX_PROMPT_LENGTH} characters a line, or longer ones in a .csv or .jsonl file"
            )
        if not prompt or prompt.startswith("#"):
            continue
        if first and (_JSON.match(prompt) or _is_header(prompt)):
            raise ValueError(
                f"{path} begins with {prompt[:40]!r}, like a table or JSON: give a .csv or .jsonl file with the "
                f"texts as {_PROMPT!r}, or let another prompt be the first"
            )
        first = False
        yield f"line {number}", {_PROMPT: prompt}


def _is_header(line: str) -> bool:
    """Whether the line holds the names of a table's columns."""
    names = [cell.strip().strip('"').lower() for cell in re.split(r"[,;|\t]", line)]
    if not _PROMPT_COLUMNS.isdisjoint(names):
        return True
    return not _TEXT_COLUMNS.isdisjoint(names) and all(len(name.split()) <= 1 for name in names)


def _csv_records(path: Path) -> _Records:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        _check_columns(path, names)
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"line {reader.line_num} of {path} has {len(cells)} fields, not {len(names)}: put texts with "
                    "commas or line breaks in quotes"
                )
            yield f"line {reader.line_num}", dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num} of {path} is not valid CSV ({error}): put texts with commas or line breaks in "
            'quotes, and double the quotes within ("a ""big"" cat")'
        ) from error


def _json_records(path: Path) -> _Records:
    form = 'write one object per line, such as {"prompt": "a cat"}'
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is not valid JSON ({error}): {form}") from error
        if not isinstance(fields, dict) or _PROMPT not in fields:
            raise ValueError(f"line {number} of {path} has no field {_PROMPT!r}: {form}")
        yield f"line {number}", fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name appears twice in an object")
    return fields


def _parquet_records(path: Path) -> _Records:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _not_installed(path) from error
    try:
        table = ParquetFile(path).read()
    except (ValueError, OSError) as error:  # pyarrow raises these
        raise ValueError(f"{path} is not a complete Parquet file: write it again") from error
    _check_columns(path, table.column_names)
    return ((f"row {number}", fields) for number, fields in enumerate(table.to_pylist(), start=1))


def _dataset(folder: Path) -> _Records:
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"the folder {folder} was not written by save_to_disk of datasets: give {KINDS}")
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise _not_installed(folder) from error
    try:
        data = load_from_disk(str(folder))
    except (ValueError, OSError, LookupError) as error:
        raise ValueError(f"the dataset in {folder} is empty, damaged or of another version: save it again") from error
    if isinstance(data, DatasetDict):
        if len(data) != 1:
            raise ValueError(f"{folder} holds the sets {', '.join(data)}: give the folder of one of them")
        (data,) = data.values()
    _check_columns(folder, data.column_names)
    # Plain values and all columns, because the folder may ask for tensors or only for some columns.
    return ((f"row {number}", fields) for number, fields in enumerate(data.with_format(None), start=1))


def _not_installed(path: Path) -> ValueError:
    return ValueError(f"reading {path} needs the package datasets: pip install datasets, or give {KINDS}")


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if names.count(_PROMPT) != 1 or len(set(names)) < len(names):
        wrong = "has a column twice" if len(set(names)) < len(names) else f"has no column {_PROMPT!r}"
        found = ", ".join(map(repr, names))[:200]
        raise ValueError(f"{path} {wrong} (columns: {found}): name each once, the texts {_PROMPT!r}")


_READERS: dict[str, Callable[[Path], _Records]] = {
    "": _text_records,
    ".txt": _text_records,
    ".csv": _csv_records,
    ".jsonl": _json_records,
    ".parquet": _parquet_records,
}
