"""Runs sections one after the other, so that none costs another its facts. Standard library only: it cannot hang.

Sections run in worker processes. One worker serves all that share a model; those that may poison the CUDA context run
alone, in workers of their own. At a section's deadline an exception ends it in its worker; where that does not help
(code that never returns to Python) the worker is killed, and the next section gets a new one.
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

LEAST_SECONDS = 3.0  # nothing begins with less
START_SECONDS = 90.0  # imports and the start of CUDA
FAULT_SECONDS = 5.0  # of a section with an injected fault, which may be to hang
CUT = "left out or cut off: no time"


@dataclass(frozen=True)
class Section:
    """A function "module:function" of this package that gets a `Lab`, and the seconds it may take.

    alone: in a worker of its own. background: also alone, beside the sections after it.
    """

    name: str
    seconds: float
    target: str
    says: str
    alone: bool = False
    background: bool = False


class Lab(Protocol):
    """What a worker keeps between its sections."""

    facts: Facts

    def tidy(self) -> None:
        """Free what a section left. Raises where the device can no longer be used."""


@dataclass(frozen=True)
class Settings:
    """What workers are told. lab: "module:function" that makes a `Lab` of them; faults: what to inject, by section."""

    facts: Facts
    dry: bool = False
    steps: int = 20
    grace: float = 10.0
    lab: str = "lab:make"
    faults: dict[str, str] = field(default_factory=dict)
    method: str = "forkserver"


class OutOfTime(BaseException):
    """A section's deadline. No `Exception`, so that no section takes it for its own failure."""


@dataclass(frozen=True)
class Outcome:
    """How a section ended: "ok", or why not. usable: whether its worker can go on."""

    status: str
    usable: bool = True


def resolved(target: str) -> Callable[[Any], Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"benchmarks.gpu_sections.{module}"), name)


# In the worker.


def serve(pipe: Connection, settings: Settings) -> None:
    """A worker: says what is common to its facts, or why it cannot start; then runs sections as they come."""
    os.setsid()  # so that its own children end with it
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
    """Run it until its deadline, whatever it raises."""
    if section.name in settings.faults:
        fault = importlib.import_module("benchmarks.gpu_sections.faults")
        lab.facts.after_next = fault.FAULTS[settings.faults[section.name]]
    signal.signal(signal.SIGALRM, _ring)
    try:
        try:
            # Again and again: what rings inside a callback of C code is dropped.
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
        """What is common to its facts. Raises RuntimeError: it cannot start."""
        said = self.pipe.recv() if self.pipe.poll(seconds) else "does not answer"
        if isinstance(said, str):
            raise RuntimeError(said)
        return said

    def begin(self, section: Section, seconds: float, grace: float) -> None:
        self.section, self.began = section, time.monotonic()
        self.ends = self.began + seconds + grace
        with suppress(OSError):  # a worker that has died meanwhile is found by its silence
            self.pipe.send((section, seconds))

    def outcome(self) -> Outcome:
        """How its section ended, waiting for that until its deadline and the grace after it."""
        try:
            if self.pipe.poll(max(0.0, self.ends - time.monotonic())):
                return self.pipe.recv()
            return Outcome("out of time: did not come back, killed", usable=False)
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode or 0
            return Outcome(f"died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}", usable=False)

    def kill(self) -> None:
        """End it and its children. Does not wait: what hangs in the driver may outlive this."""
        for kill in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
            try:
                kill()
            except (OSError, ValueError):
                continue


class Driver:
    """Runs sections within `total` seconds in all, each within its own times `patience`."""

    def __init__(self, settings: Settings, total: float, patience: float = 1.0):
        self.settings, self.patience = settings, patience
        self.ends = time.monotonic() + total
        self.shared: Worker | None = None
        self.behind: list[Worker] = []

    def run(self, sections: Sequence[Section]) -> None:
        """All of them; one line about each is written, whatever happens."""
        waiting = list(sections)
        try:
            while waiting:
                self._one(waiting[0])
                waiting.pop(0)
                self._collect(wait=False)
            self._collect(wait=True)
        finally:  # also where this process is told to end
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
        # A section that is stuck ends within the total, too.
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
        """Those in the background that are done; or all, each until its deadline."""
        for worker in list(self.behind):
            if wait or worker.pipe.poll(0) or time.monotonic() > worker.ends:
                worker.ends = min(worker.ends, self.ends)
                self._ended(worker)
                self.behind.remove(worker)

    def _worker(self, section: Section) -> Worker | None:
        """The shared worker, or one of its own; None where none starts."""
        alone = section.alone or section.background
        if not alone and self.shared is not None:
            return self.shared
        # If importing has started CUDA, no fork of that process can use it.
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
