"""Prompts: the built-in sets, files as people write them, and what is refused."""

import pytest

from alignprop_fast.prompts.rows import MAX_PROMPT_LENGTH, PROMPT_SETS, load_prompts


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_sets_hold_each_prompt_once(name):
    prompts = load_prompts(name)
    assert len(prompts) >= 6 and len(set(prompts)) == len(prompts)
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


def test_the_papers_animals():
    """45 to train on and 6 held out, as in the assets of the published code."""
    assert len(load_prompts("animals")) == 45 and len(load_prompts("animals-heldout")) == 6
    assert load_prompts("animals")[0] == "cat" and load_prompts("animals-heldout")[0] == "snail"


@pytest.mark.parametrize("name", ["demo", "animals"])
def test_held_out_prompts_are_not_trained_on(name):
    assert not set(load_prompts(name)) & set(load_prompts(f"{name}-heldout"))


def test_a_file_gives_its_lines_without_blanks_and_comments(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# mine\n\n  a café at night \r\n#a dog\na cat # really\n".encode())
    assert load_prompts(file) == load_prompts(str(file)) == ["a café at night", "a cat # really"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "holds no prompts"),
        (b"\n  \n# nothing\n", "holds no prompts"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not UTF-8 text"),
        (b"a cat\0a dog\n", "binary file"),
        (b"a cat\n" + b"x" * (MAX_PROMPT_LENGTH + 1), "line 2 of .* has 1001 characters"),
    ],
)
def test_refused_files(tmp_path, content, match):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        load_prompts(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_sets(tmp_path):
    for missing in (tmp_path / "none.txt", "a prompt in place of a file" * 20):
        with pytest.raises(FileNotFoundError, match="animals-heldout"):
            load_prompts(missing)
    with pytest.raises(ValueError, match=r"the folder .* was not written by save_to_disk"):
        load_prompts(tmp_path)
