"""Prompts by name or from a file."""

from __future__ import annotations

from pathlib import Path

MAX_PROMPT_LENGTH = 1000  # characters; text encoders read 77 tokens, so a longer line is some other kind of file

_DEMO = Path(__file__).with_name("demo")

# Simple animals, as the prompts of DDPO (Black et al. 2023) and AlignProp (Prabhudesai et al. 2023).
_ANIMALS = (
    "cat, dog, horse, monkey, rabbit, zebra, spider, bird, sheep, deer, cow, goat, lion, tiger, bear, raccoon, fox, "
    "wolf, lizard, beetle, ant, butterfly, fish, shark, whale, dolphin, squirrel, mouse, rat, snake, turtle, frog, "
    "chicken, duck, goose, bee, pig, turkey, fly, llama, camel, bat, gorilla, hedgehog, kangaroo"
)
_ANIMALS_HELDOUT = (
    "cheetah, elephant, giraffe, hippopotamus, jellyfish, koala, leopard, octopus, ostrich, otter, panda, penguin, "
    "porcupine, seal, snail, swan, walrus, yak"
)

PROMPT_SETS = ("demo", "demo-heldout", "animals", "animals-heldout")


def load_prompts(spec: str | Path) -> list[str]:
    """Prompts of a built-in set, or of a text file (UTF-8) with one a line; blank and # lines are left out.

    Sets: "demo" and "demo-heldout" (things the bundled model can draw), "animals" and "animals-heldout" (45 and 18
    animals, for models that know photographs). No prompt is in a set and in its held-out set.

    Raises:
        FileNotFoundError: neither a set nor a file.
        ValueError: a file without prompts, not text, or with a line of more than 1000 characters.
    """
    if spec in ("demo", "demo-heldout"):
        return _read(_DEMO / ("prompts.txt" if spec == "demo" else "prompts_heldout.txt"))
    if spec in ("animals", "animals-heldout"):
        return (_ANIMALS if spec == "animals" else _ANIMALS_HELDOUT).split(", ")
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
