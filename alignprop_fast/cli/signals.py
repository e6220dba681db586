"""Signals that ask a command to stop: a run stops after the step at hand, everything else at once and in order."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console

from alignprop_fast.cli.support import BY_SIGNAL

# What asks a run to stop: Ctrl-C, a scheduler or `kill`, a terminal that is closed (not everywhere).
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does: by an exception, so that it leaves things in order.

    Raises:
        SystemExit: with the exit code, 128 and the signal's number.
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
    """Handle these signals, but for those that this process was started to ignore, as by nohup; the handlers before."""
    heard = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heard}


class Interrupt:
    """Ctrl-C, SIGTERM or a closed terminal ask once to stop after the step at hand: `number` is then the signal's.

    Ctrl-C again stops at once, unless it comes within a second: launchers pass a signal on that all have had already.
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
        text = f"{name}: stopping after this step, which is then saved; Ctrl-C (again) stops at once"
        self._console.print(text, soft_wrap=True)
