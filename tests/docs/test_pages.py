"""What README and docs say is there: files, links, imports, options. The site itself is built by `make docs`."""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
AT_THE_ROOT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*AT_THE_ROOT, *sorted(DOCS.rglob("*.md")), ROOT / "alignprop_fast" / "demo" / "README.md"]
FOLDERS = ("alignprop_fast", "benchmarks", "csrc", "docs", "kernels", "tests")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    """The fenced blocks of a language, without the indentation that they have in a list."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def python_blocks(page):
    return [block for block in blocks(page, "python") if "--8<--" not in block]


@each_page
def test_every_file_that_is_named_is_there(page):
    named = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w/?", page.read_text(encoding="utf-8"))
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", AT_THE_ROOT, ids=lambda page: page.name)
def test_every_link_at_the_root_leads_somewhere(page):
    """Those inside docs/ are checked as the site is built."""
    for target in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        file = ROOT / target[0] if target[0] else page
        assert file.exists(), target
        if target[1]:
            assert target[1] in anchors(file), target


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_page
def test_python_compiles_and_its_imports_resolve(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("alignprop_fast"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@each_page
def test_every_option_on_a_command_line_exists(page):
    from alignprop_fast.cli.app import app

    commands = typer.main.get_command(app).commands
    text = "\n".join(blocks(page, "bash")) + "\n" + "\n".join(re.findall(r"`(alignprop-fast [^`]*)`", page.read_text()))
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if len(words) > 1 and words[0] == "alignprop-fast" and not words[1].startswith("-"):
            known = {
                opt for parameter in commands[words[1]].params for opt in (*parameter.opts, *parameter.secondary_opts)
            }
            assert {word for word in words[2:] if word.startswith("--")} <= known | {"--help"}, line
            for reward in ("--reward", "--watch-reward"):
                if words[1] != "plan" and reward in words and needs_weights(words[words.index(reward) + 1]):
                    assert f"{reward}-model" in words, line


def needs_weights(reward):
    return bool({"aesthetic", "hpsv2", "imagereward", "pickscore"} & set(re.split("[:,]", reward)))


def triples(text):
    """Runs of three words; numbers, marks and <placeholders> are none."""
    words = re.findall(r"[A-Za-z_]+(?:['.-][A-Za-z_]+)*", re.sub("<[^>]*>", "", text))
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def texts(path):
    """The texts that a source file can show; what is filled in becomes a placeholder."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value


def test_messages_in_troubleshooting_are_those_of_the_package():
    """Such a message shares a quarter of its runs of three words with the package's texts; a reworded one does not."""
    sources = (ROOT / "alignprop_fast").rglob("*.py")
    known = {triple for path in sources for text in texts(path) for triple in triples(text)}
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    commands = ("alignprop-fast ", "accelerate launch", "torchrun ", "pip ", "python ", "DefaultDDPO")
    quoted = re.findall(r'^### "(.*)"$', page, re.MULTILINE) + re.findall(r"`([^`]*)`", page)
    long = [message for message in quoted if not message.startswith(commands) and len(triples(message)) > 5]
    assert len(long) > 30
    assert not [message for message in long if len(triples(message) & known) < len(triples(message)) / 4]


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_what_the_commands_say():
    make_options = script("make_options")
    page = make_options.PAGE.read_text(encoding="utf-8")
    assert page == make_options.page(), "write it anew: python -P docs/make_options.py"


def test_figures_in_tables_are_those_of_the_results():
    make_tables = script("make_tables")
    for page in make_tables.PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert text == make_tables.written(page), "write them anew: python -P docs/make_tables.py"


def test_a_figure_is_written_with_the_decimals_and_the_words_around_it():
    make_tables = script("make_tables")
    lines = ["| what | took |", "|---|---|", "| this | 9,000.1 to 3 s (0.05) |", ""]
    table = make_tables.Table("page", lines[0], lambda label: [[1234.56, 2.4, 0.123]])
    assert list(table.written(lines)) == [*lines[:2], "| this | 1,234.6 to 2 s (0.12) |", ""]
    table = make_tables.Table("page", lines[0], lambda label: [[1234.56, 2.4]])
    with pytest.raises(ValueError, match="has 3 figures, not 2"):
        list(table.written(lines))


@pytest.mark.slow("trains the bundled model")
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(python_blocks(DOCS / "tutorial.md")), "tutorial.md", "exec"), {})
    assert (tmp_path / "tutorial-lora" / "apple.png").is_file()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
