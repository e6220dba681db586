"""Faults for a dry run: the worst that a section can do."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable


def raise_exception() -> None:
    raise RuntimeError("injected")


def hang() -> None:
    """Hangs in Python, so the section's deadline ends it."""
    while True:
        time.sleep(0.05)


def stuck() -> None:
    """Hangs as in C: no Python runs, so no deadline inside the process ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    hang()


def fill_memory() -> None:
    import torch

    torch.empty(2**50, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    sys.exit(3)


FAULTS: dict[str, Callable[[], None]] = {
    "exception": raise_exception,
    "hang": hang,
    "stuck": stuck,
    "memory": fill_memory,
    "signal": die,
    "exit": leave,
}
