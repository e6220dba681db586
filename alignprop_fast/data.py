"""Prompts by name or from a file."""

from __future__ import annotations

from pathlib import Path

MAX_PROMPT_LENGTH = 1000  # characters; text encoders read 77 tokens, so a longer line is some other kind of file

_HERE = Path(__file__).parent
_FILES = {
    "demo": _HERE / "demo" / "prompts.txt",
    "demo-heldout": _HERE / "demo" / "prompts_heldout.txt",
    "animals": _HERE / "prompts" / "animals.txt",
    "animals-heldout": _HERE / "prompts" / "animals_heldout.txt",
    "general": _HERE / "prompts" / "general.txt",
}
PROMPT_SETS = tuple(_FILES)


def load_prompts(spec: str | Path) -> list[str]:
    """Prompts of a built-in set, or of a text file (UTF-8) with one a line; blank and # lines are left out.

    Sets: "demo" and "demo-heldout" (things the bundled model can draw), "animals" and "animals-heldout" (the 45 animals
    that DDPO and AlignProp train on, and the 6 that AlignProp holds out), "general" (62 scenes, objects, counts, places
    and styles of our own writing). No prompt is in a set and in its held-out set.

    Raises:
        FileNotFoundError: neither a set nor a file.
        ValueError: a file without prompts, not text, or with a line of more than 1000 characters.
    """
    if spec in _FILES:
        return _read(_FILES[str(spec)])
    path = Path(spec).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a text file with one prompt a line")
    if not path.exists():
        raise FileNotFoundError(
            f"no prompts file {path}: give a text file with one prompt a line, or a set: {', '.join(PROMPT_SETS)}"
        )
    return _read(path)


def _read(path: Path) -> list[str]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: give a text file with one prompt a line, saved as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} is a binary file: give a text file with one prompt a line")
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        prompt = line.strip()
        if len(prompt) > MAX_PROMPT_LENGTH:
            raise ValueError(
                f"line {number} of {path} has {len(prompt)} characters: write one prompt of at most "
                f"{MAX_PROMPT_LENGTH} characters a line"
            )
        if prompt and not prompt.startswith("#"):
            prompts.append(prompt)
    if not prompts:
        raise ValueError(
            f"{path} holds no prompts: write at least one, one a line (blank lines and # lines do not count)"
        )
    return prompts
