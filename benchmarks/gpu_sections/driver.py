"""Runs sections one after the other; if one fails, the others keep their facts.

It uses only the standard library, so that it cannot hang in CUDA. Sections run in worker processes. One worker serves
all that share a model. Sections that may break the CUDA context get their own worker. At a section's deadline an
exception ends it in its worker. If that does not help, because code never returns to Python, the worker is killed and
the next section gets a new one.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.gpu_sections.facts import Facts

LEAST_SECONDS = 3.0  # no section begins with less time left
START_SECONDS = 90.0  # imports and the start of CUDA
FAULT_SECONDS = 5.0  # limit of a section with an injected fault, which may hang
CUT = "left out or cut off: no time"


@dataclass(frozen=True)
class Section:
    """A function "module:function" of this package that gets a `Lab`, and the seconds it may take.

    alone: in its own worker. background: in its own worker, while later sections run.
    """

    name: str
    seconds: float
    target: str
    says: str
    alone: bool = False
    background: bool = False


class Lab(Protocol):
    """The state that a worker keeps between its sections."""

    facts: Facts

    def tidy(self) -> None:
        """Free what a section left behind. Raises if the device can no longer be used."""


@dataclass(frozen=True)
class Settings:
    """Settings of workers. lab: "module:function" that makes a `Lab` from them; faults: by section, what to inject."""

    facts: Facts
    dry: bool = False
    steps: int = 20
    grace: float = 10.0
    lab: str = "lab:make"
    faults: dict[str, str] = field(default_factory=dict)
    method: str = "forkserver"


class OutOfTime(BaseException):
    """A section's deadline. It is not an `Exception`, so that no section catches it as its own failure."""


@dataclass(frozen=True)
class Outcome:
    """How a section ended: "ok", or the reason. usable: whether its worker can continue."""

    status: str
    usable: bool = True


def resolved(target: str) -> Callable[[Any], Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"benchmarks.gpu_sections.{module}"), name)


# In the worker.


def serve(pipe: Connection, settings: Settings) -> None:
    """Run a worker: send what its facts have in common, or why it cannot start; then run the sections that arrive."""
    os.setsid()  # its children can then be ended with it
    try:
        lab = resolved(settings.lab)(settings)
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(lab.facts.common)
    while True:
        section, seconds = pipe.recv()
        pipe.send(run_section(section, seconds, lab, settings))


def run_section(section: Section, seconds: float, lab: Lab, settings: Settings) -> Outcome:
    """Run a section until its deadline, and handle everything that it raises."""
    if section.name in settings.faults:
        fault = importlib.import_module("benchmarks.gpu_sections.faults")
        lab.facts.after_next = fault.FAULTS[settings.faults[section.name]]
    signal.signal(signal.SIGALRM, _ring)
    try:
        try:
            # The timer repeats, because an exception inside a callback of C code is dropped.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            resolved(section.target)(lab)
            status = "ok"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except OutOfTime:
        status = "out of time"
    except BaseException as error:
        status = f"failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"
        traceback.print_exc(limit=-6)
    lab.facts.after_next = None
    try:
        lab.tidy()
    except Exception as error:
        return Outcome(f"{status}; the device is lost: {str(error)[:100]}", usable=False)
    return Outcome(status)


def _ring(number: int, frame: Any) -> None:
    raise OutOfTime


# In the process that drives.


class Worker:
    """A worker process, and the pipe to it."""

    def __init__(self, settings: Settings):
        context: Any = multiprocessing.get_context(settings.method)
        if settings.method == "forkserver":
            context.set_forkserver_preload(["benchmarks.gpu_sections.preload"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.section: Section | None = None
        self.began = self.ends = 0.0

    def hello(self, seconds: float) -> dict[str, Any]:
        """What its facts have in common. Raises RuntimeError if it cannot start."""
        said = self.pipe.recv() if self.pipe.poll(seconds) else "does not answer"
        if isinstance(said, str):
            raise RuntimeError(said)
        return said

    def begin(self, section: Section, seconds: float, grace: float) -> None:
        self.section, self.began = section, time.monotonic()
        self.ends = self.began + seconds + grace
        with suppress(OSError):  # a dead worker shows later, when it does not answer
            self.pipe.send((section, seconds))

    def outcome(self) -> Outcome:
        """Wait for the end of its section, at most until the deadline plus grace, and say how it ended."""
        try:
            if self.pipe.poll(max(0.0, self.ends - time.monotonic())):
                return self.pipe.recv()
            return Outcome("out of time: did not come back, killed", usable=False)
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode or 0
            return Outcome(f"died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}", usable=False)

    def kill(self) -> None:
        """Kill it and its children. Does not wait, because a process that hangs in the driver may live on."""
        for kill in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
            try:
                kill()
            except (OSError, ValueError):
                continue


class Driver:
    """Runs sections within `total` seconds, each within its own seconds times `patience`."""

    def __init__(self, settings: Settings, total: float, patience: float = 1.0):
        self.settings, self.patience = settings, patience
        self.ends = time.monotonic() + total
        self.shared: Worker | None = None
        self.behind: list[Worker] = []

    def run(self, sections: Sequence[Section]) -> None:
        """Run all of them and write one line about each, whatever happens."""
        waiting = list(sections)
        try:
            while waiting:
                self._one(waiting[0])
                waiting.pop(0)
                self._collect(wait=False)
            self._collect(wait=True)
        finally:  # also if this process is told to end
            for worker in [*self.behind, *([self.shared] if self.shared else [])]:
                worker.kill()
            for name in [w.section.name for w in self.behind if w.section] + [section.name for section in waiting]:
                self._say(name, CUT, 0.0)

    def _left(self) -> float:
        return self.ends - time.monotonic()

    def _one(self, section: Section) -> None:
        if self._left() < LEAST_SECONDS:
            self._say(section.name, CUT, 0.0)
            return
        worker = self._worker(section)
        if worker is None:
            self._say(section.name, "left out: no worker starts", 0.0)
            return
        # A stuck section must also end within the total.
        longest = max(1.0, self._left() - min(self.settings.grace, self._left() / 2))
        seconds = FAULT_SECONDS if section.name in self.settings.faults else section.seconds * self.patience
        worker.begin(section, min(seconds, longest), self.settings.grace)
        if section.background:
            self.behind.append(worker)
        else:
            self._ended(worker)

    def _ended(self, worker: Worker) -> None:
        """Wait for the worker's section and say how it ended."""
        outcome, section = worker.outcome(), worker.section
        assert section is not None
        if worker is not self.shared or not outcome.usable:
            worker.kill()
            self.shared = None if worker is self.shared else self.shared
        self._say(section.name, outcome.status, time.monotonic() - worker.began)

    def _collect(self, wait: bool) -> None:
        """Collect background sections that are done; or wait for all, each until its deadline."""
        for worker in list(self.behind):
            if wait or worker.pipe.poll(0) or time.monotonic() > worker.ends:
                worker.ends = min(worker.ends, self.ends)
                self._ended(worker)
                self.behind.remove(worker)

    def _worker(self, section: Section) -> Worker | None:
        """The shared worker, or a separate one; None if none starts."""
        alone = section.alone or section.background
        if not alone and self.shared is not None:
            return self.shared
        # The second method is for the case that importing has started CUDA, which a fork cannot use.
        for method in dict.fromkeys((self.settings.method, "spawn")):
            worker = Worker(Settings(**{**vars(self.settings), "method": method}))
            try:
                self.settings.facts.common |= worker.hello(min(START_SECONDS * self.patience, self._left()))
                self.shared = self.shared if alone else worker
                return worker
            except (RuntimeError, EOFError, OSError) as error:
                worker.kill()
                self.settings.facts.write(section.name, "no worker", method=method, reason=str(error)[:300])
        return None

    def _say(self, name: str, status: str, seconds: float) -> None:
        self.settings.facts.write(name, "section", status=status, seconds=round(seconds, 1))
        print(f"{name:10} {seconds:6.1f} s  {status}", file=sys.stderr, flush=True)
