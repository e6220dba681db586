"""Signals that ask a command to stop. A run stops after its current step; other commands stop at once and clean up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console

from alignprop_fast.cli.support import BY_SIGNAL

# A run is asked to stop by Ctrl-C, by a scheduler or `kill`, or by a closed terminal (not on every system).
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block by an exception, as Ctrl-C does, so that it cleans up.

    Raises:
        SystemExit: with the exit code 128 + the signal's number.
    """
    before = _listen(_leave_at_once, [number for number in STOPPING if number != signal.SIGINT])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    raise SystemExit(BY_SIGNAL + number)


def _listen(handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> dict[int, Any]:
    """Install the handler, except for signals ignored since the start (nohup); returns the former handlers."""
    heard = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heard}


class Interrupt:
    """The first Ctrl-C, SIGTERM or closed terminal asks to stop after the current step: `number` is then the signal's.

    A second Ctrl-C stops at once. Within the first second it is ignored, because launchers repeat a signal that every
    process has already received.
    """

    def __init__(self, console: Console):
        self.number = 0
        self._console, self._since = console, 0.0

    def __enter__(self) -> Interrupt:
        self._before = _listen(self._ask, STOPPING)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if number == signal.SIGINT and time.monotonic() - self._since > 1:
                raise KeyboardInterrupt
            return
        self.number, self._since = number, time.monotonic()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"{name}: stopping after this step and saving it; Ctrl-C (again) stops at once"
        self._console.print(text, soft_wrap=True)
