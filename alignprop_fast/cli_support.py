"""What the commands share: errors in one line, quiet libraries, devices, output folders, Ctrl-C, progress."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from alignprop_fast.metrics import StepMetrics

BAD_INPUT, INTERRUPTED = 2, 130


def process_index() -> int:
    """Of this process among those that `accelerate launch` or torchrun started; 0: the main one, or the only one."""
    return int(os.environ.get("RANK", "0"))


def make_console() -> Console:
    """What the commands print on; of several processes only the main one is heard."""
    return Console(highlight=False, quiet=process_index() > 0)


def fail(message: str) -> None:
    """One line on stderr. Of several processes each may fail in its own way."""
    who = f"process {process_index()}: " if process_index() else ""
    print(f"alignprop-fast: {who}{' '.join(message.split())}", file=sys.stderr, flush=True)


@contextmanager
def setup_errors() -> Iterator[None]:
    """Turn what set-up raises for the user (ValueError, OSError) into one line and exit code 2; a lost process: 1."""
    try:
        yield
    except RuntimeError as error:
        from alignprop_fast.processes import ProcessLost

        if not isinstance(error, ProcessLost):
            raise
        fail(str(error))
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        fail(str(error) or type(error).__name__)
        raise typer.Exit(BAD_INPUT) from error


def quiet_libraries(console: Console) -> None:
    """Keep the libraries' progress bars and advice off the screen, and show this package's own warnings on it."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging
    from rich.logging import RichHandler

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of CPU kernels that it could not download
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    logging.getLogger("py.warnings").propagate = False
    own = logging.getLogger("alignprop_fast")
    own.handlers = [RichHandler(console=console, show_time=False, show_path=False)]
    own.propagate = False


def pick_device(name: str) -> str:
    """ "cpu", "cuda" or "cuda:N" from an option that may also be "auto"; makes a CUDA device the current one.

    Raises:
        ValueError: a device that is not there, or that training does not know.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    if index and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device {name} is one GPU, and each process has its own: leave --device out")
    if kind == "cuda":
        if int(index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"there is no device {name}, torch sees {torch.cuda.device_count()} GPUs: use --device cpu"
            )
        torch.cuda.set_device(int(index or 0))
    return name


def budget_here(wanted_bytes: int | None, device: str) -> tuple[str, int, str]:
    """Name of the device, the memory budget on it (all of it where none is wanted), and a note if that is less.

    A GPU's budget is held to what is free there later (`DifferentiableSampler`), when that can be known.

    Raises:
        ValueError: more was wanted than the device has.
    """
    import os

    import torch

    from alignprop_fast.planner import budget_on

    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        budget_bytes, _ = budget_on(properties.name, properties.total_memory, wanted_bytes, context_bytes=0)
        return properties.name, wanted_bytes or budget_bytes, ""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "this computer", *budget_on("this computer", memory_bytes, wanted_bytes, context_bytes=0)


def check_writable(folder: Path) -> None:
    """Try to write where `folder` is or will be, without leaving anything.

    Raises:
        ValueError: a file in the way, or no right to write.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to {folder}, since {there} is a file: choose another --output-dir")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {there} ({error.strerror}): choose another --output-dir") from error


def check_tracker(name: str | None) -> None:
    """accelerate would go on without a tracker that is not installed.

    Raises:
        ValueError: that is the case.
    """
    if name is not None and find_spec(name) is None:
        raise ValueError(f"--log-with {name} needs {name}: pip install {name}, or leave the option out")


class Interrupt:
    """Ctrl-C asks once to stop after the step at hand (`requested`); the second time it stops at once."""

    def __init__(self, console: Console):
        self.requested = False
        self._console = console

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._console.print("stopping after this step, which is then saved; Ctrl-C again stops at once")


class Display:
    """Progress of a run: a bar with reward, speed, memory and time left; plain lines where there is no terminal."""

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
            f"peak {metrics.peak_bytes / 2**30:.2f} GiB"
        )
        self._bar.update(self._task, completed=metrics.step, numbers=numbers)
        if not self._console.is_terminal and (metrics.step % self._every == 0 or metrics.step == self._steps):
            left = (self._steps - metrics.step) * sum(self._seconds) / len(self._seconds)
            self._console.print(f"step {metrics.step}/{self._steps}  {numbers}  {left:.0f} s left", highlight=False)


def existing_as_absolute(value: str) -> str:
    """A path that is there in full, so that a run can be resumed from another folder; other texts as they are."""
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def plain(value: Any) -> Any:
    """An option's value as YAML and JSON take it."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return str(value) if isinstance(value, str) else value
