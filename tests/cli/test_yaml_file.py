"""The file of options: a value is the text as written, as on the command line, and not YAML's interpretation."""

from dataclasses import replace

import pytest
import typer
import yaml

from alignprop_fast.cli.yaml_file import read_yaml
from alignprop_fast.training.declaration import Command, taken, values
from alignprop_fast.training.options import TrainOptions

DEFAULTS = TrainOptions()
DECLARED = taken(DEFAULTS, Command.TRAIN)


@pytest.fixture
def options(tmp_path, train):
    """options(content): those of `train` under a file with that content."""

    def read(content):
        file = tmp_path / "run.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return train("--config", file)

    return read


@pytest.mark.parametrize("name", ["negative_prompt", "prompts", "output_dir", "model", "reward", "memory_budget"])
@pytest.mark.parametrize(
    "written",
    [
        "no",
        "on",
        "Yes",
        "off",
        "true",
        "1e3",
        "12",
        "010",
        "1_000",
        "0x1F",
        "2024-01-01",
        "12:30:00",
        "1.50",
        ".5",
        "3.",
    ],
)
def test_a_text_is_taken_as_it_is_written(options, name, written):
    assert getattr(options(f"{name}: {written}\n"), name) == written
    assert getattr(options(f"{name}: '{written}'\n"), name) == written


@pytest.mark.parametrize("written", ["", "~", "null", "Null"])
def test_nothing_leaves_the_default_and_quotes_make_a_text_of_it(options, written):
    assert options(f"negative_prompt: {written}\nprompts: {written}\n") == DEFAULTS
    assert options(f"negative_prompt: '{written}'\n").negative_prompt == written


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("allow_pickle: yes", {"allow_pickle": True}),
        ("cache_text: off", {"cache_text": False}),
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),
        ("steps: 010", {"steps": 10}),  # as --steps 010; YAML would read 8
        ("reward_model: [no, 12]", {"reward_model": ("no", "12")}),
        ("reward_model: on", {"reward_model": ("on",)}),
        ("negative_prompt: |\n  blurry\n  no hands", {"negative_prompt": "blurry\nno hands"}),
        ("negative_prompt: !!str 12", {"negative_prompt": "12"}),
        ("\ufeffsteps: 7", {"steps": 7}),
        ("steps: 7".encode("utf-16"), {"steps": 7}),
    ],
)
def test_an_option_reads_its_own_type(options, content, expected):
    assert options(content) == replace(DEFAULTS, **expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("steps: yes", "--steps"),
        ("steps: 4.5", "--steps"),
        ("steps: 1e2", "--steps"),
        ("steps: 0x10", "--steps"),
        ("batch_size: '4 pictures'", "--batch-size"),
        ("seed: true", "--seed"),
        ("eta: on", "--eta"),
        ("learning_rate: .inf.", "--learning-rate"),
        ("max_drop: 1:30", "--max-drop"),
        ("allow_pickle: maybe", "--allow-pickle"),
        ("allow_pickle: 2", "--allow-pickle"),
        ("optimizer: no", "--optimizer"),
        ("log_with: no", "--log-with"),
        ("mixed_precision: yes", "--mixed-precision"),
        ("steps: 3\nseed: 1\nsteps: 4", "line 3 of"),
        ("batch-size: 3", "did you mean 'batch_size'"),
        ("no: 3", "unknown option 'no'"),
        ("prompts: [a.txt, b.txt]", "must be a single value"),
        ("negative_prompt: {blurry: 1}", "put a text in quotes"),
        ("negative_prompt: !mine x", "put a text in quotes"),
        ("negative_prompt: !!python/name:os.system x", "put a text in quotes"),
        ("reward_model: [[a]]", "must be a list of texts"),
        ("reward_model: [null]", "must be a list of texts"),
        ("? [a]\n: 3", "no name before the colon"),
        ("negative_prompt: a: b", "not valid YAML in line 1"),
        ("steps: 3\n---\nsteps: 4", "not valid YAML in line 2"),
        ("steps:3", "contains no options"),
        (b"steps: \xff", "not valid YAML"),
    ],
)
def test_what_is_none_is_refused_in_one_line(options, content, words):
    with pytest.raises(typer.BadParameter) as caught:
        options(content)
    message = caught.value.format_message()
    assert words in message and "\n" not in message.strip()


TEXTS = (
    "no",
    "~",
    "null",
    "",
    " a ",
    "1e3",
    "a: b",
    "#x",
    "'",
    '"',
    "é\u2028\x85\t",
    "a\nb\n",
    "{x}",
    "- a",
    "\U0001f600",
)


def test_the_file_that_a_run_writes_is_read_back_the_same(options):
    """Every option with an unusual value, because a run is resumed from its own config.yaml."""
    for text in TEXTS:
        odd = {
            f.name: text for f, o in DECLARED if f.type in ("str", "str | None", "int | str | None") and not o.choices
        }
        wanted = replace(
            DEFAULTS, **odd, reward_model=(text, "x"), learning_rate=1e-05, lora_alpha=4.0, allow_pickle=True
        )
        assert options(yaml.safe_dump(values(wanted, Command.TRAIN), sort_keys=False)) == wanted
    assert options(yaml.safe_dump(values(DEFAULTS, Command.TRAIN), sort_keys=False)) == DEFAULTS


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(typer.BadParameter, match="cannot read the config file"):
        read_yaml(tmp_path / "none.yaml")
