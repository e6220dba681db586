"""The commands print the user's texts unchanged on any terminal, and a failing output never ends a run."""

import contextlib
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.table import Table

from alignprop_fast.cli.screen import lenient_output, make_console

TEXTS = ("r [v2] x", "[/b]", "[red]x", "[bold]", ":cat:", "\\[x]", "[link=http://x]y[/link]")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_no_markup(capsys, text):
    console = make_console()
    console.print(text)
    table = Table(text, box=None)
    table.add_row(text)
    console.print(table)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [text] * 3


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_characters_that_an_encoding_lacks_are_replaced(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    lenient_output()
    console = make_console()
    console.print("a 猫 cat \udcff")
    console.print(Table("mean", "\u00b1"))
    assert written.getvalue().startswith(b"a ? cat ?\n")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("stream", [closed_pipe, lambda: "/dev/full"], ids=["closed pipe", "full disk"])
def test_the_work_goes_on_when_nobody_can_read(monkeypatch, stream):
    with open(stream(), "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        console = make_console()
        for _ in range(3):
            console.print("step")
        monkeypatch.undo()


def test_a_bar_in_a_terminal(monkeypatch):
    """While it shows a bar, rich replaces stdout."""
    from alignprop_fast.cli.pipeline import PictureProgress

    reader, writer = os.openpty()
    with ThreadPoolExecutor(1) as threads, open(writer, "w") as terminal:
        shown = threads.submit(read_all, reader)  # the kernel hands a terminal's text on in pieces, when it likes
        monkeypatch.setattr(sys, "stdout", terminal)
        console = make_console()
        with PictureProgress(console, 2) as progress:
            console.print("a [v2] line")
            progress.advance(2)
        monkeypatch.undo()
    assert "a [v2] line" in shown.result() and "2/2" in shown.result()


def read_all(terminal: int) -> str:
    """What is written to `terminal`, a file descriptor of its reading end, until its last writer closes it."""
    shown = b""
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # EIO: nobody writes any more
        while piece := stream.read(4096):
            shown += piece
    return shown.decode()


def test_help_in_a_pipe_that_is_ascii_and_closed():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "300"}
    command = [sys.executable, "-m", "alignprop_fast", "train", "--help"]
    whole = subprocess.run(command, env=environment, capture_output=True)
    assert (whole.returncode, whole.stderr) == (0, b"") and b"--memory-budget" in whole.stdout
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as by `| head -0`
    assert process.stderr.read() == b"" and process.wait() in (0, 1)


def test_a_full_disk_under_the_output(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "alignprop_fast", "--help"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr == "alignprop-fast: [Errno 28] No space left on device\n"
