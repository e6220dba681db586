"""Output of the commands: plain text on any terminal, and the progress of a run."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import IO, TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignprop_fast.cli.support import process_index

if TYPE_CHECKING:
    from alignprop_fast.training.metrics import StepMetrics


class _Output(io.TextIOBase):
    """stdout that drops text it cannot write (a closed pipe or terminal, a full disk), so that the work goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            drop_output(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop_output(self._stream)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def make_console() -> Console:
    """The console of the commands. Of several processes only the main one prints.

    Names, prompts and paths appear unchanged, because texts hold no markup. Style is given by `Text` and `style=`.
    """
    output = cast(IO[str], _Output(sys.stdout))
    return Console(file=output, highlight=False, markup=False, emoji=False, quiet=process_index() > 0)


def lenient_output() -> None:
    """Replace characters that the encoding of a terminal or pipe lacks, instead of raising."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # stays open until the process ends
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop_output(stream: TextIO) -> None:
    """Discard a stream's waiting and later output."""
    with suppress(OSError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_measured(console: Console, seconds: float) -> None:
    console.print(f"measured: costs of a training step, in {seconds:.1f} s")


class Waiting:
    """A bar with the time left, in a terminal, for work that tells which share of it is done.

    parts: how many parts of equal length the work has; each is told of by a function of its own.
    """

    def __init__(self, console: Console, what: str, parts: int):
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task, self._begun = self._bar.add_task("", total=parts), 0

    def __enter__(self) -> Waiting:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def next_part(self) -> Callable[[float], None]:
        """A function to be told the share of the next part that is done, from 0 to 1."""
        self._begun += 1
        return partial(self._tell, self._begun - 1)

    def _tell(self, before: int, done: float) -> None:
        self._bar.update(self._task, completed=before + done)


class Display:
    """Progress of a run: a bar with reward, speed, memory and time left, or plain lines without a terminal."""

    def __init__(self, console: Console, done: int, steps: int):
        self._console, self._done, self._steps = console, done, steps
        self._every = max(1, steps // 10)
        self._seconds: list[float] = []
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, numbers="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, metrics: StepMetrics) -> None:
        self._seconds.append(metrics.seconds)
        numbers = (
            f"reward {metrics.reward_mean:.3f}  {metrics.images_per_second:.2f} images/s  "
            f"lr {metrics.learning_rate:.2g}  peak {metrics.peak_bytes / 2**30:.2f} GiB"
        )
        self._bar.update(self._task, completed=metrics.step, numbers=numbers)
        if not self._console.is_terminal and (metrics.step % self._every == 0 or metrics.step == self._steps):
            left = (self._steps - metrics.step) * sum(self._seconds) / len(self._seconds)
            self._console.print(f"step {metrics.step}/{self._steps}  {numbers}  {left:.0f} s left")
