"""Shared by the commands: errors in one line, exit codes, quiet libraries, devices, checks of folders."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import typer
from rich.console import Console

from alignprop_fast.cli.flags import in_flags
from alignprop_fast.training.launcher import COUNT, INDEX, first_number

FAILED, BAD_INPUT, BY_SIGNAL = 1, 2, 128  # exit codes; after a signal: BY_SIGNAL + its number
INTERRUPTED = BY_SIGNAL + signal.SIGINT
ERROR_FILE = "alignprop-fast-error{}.txt"


def process_count() -> int:
    """The number of processes that `accelerate launch`, torchrun or mpirun started for this run.

    Raises:
        typer.BadParameter: the environment variable is not a number. The same holds for `process_index`.
    """
    return max(1, _place(COUNT, 1))


def process_index() -> int:
    """The index of this process among them; 0 is the main or only one."""
    return _place(INDEX, 0) if process_count() > 1 else 0


def _place(names: tuple[str, ...], default: int) -> int:
    try:
        return first_number(names, default)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def fail(message: str) -> None:
    """Print one line on stderr. Each of several processes does, because each may fail in its own way."""
    who = ""
    with suppress(typer.BadParameter):  # raised again if it is the failure itself
        who = f"process {process_index()}: " if process_index() else ""
    line = " ".join(part.strip() for part in message.splitlines())
    with suppress(OSError):  # stderr is gone
        print(f"alignprop-fast: {who}{line}", file=sys.stderr, flush=True)


@contextmanager
def setup_errors() -> Iterator[None]:
    """Turn the set-up's errors for the user (ValueError, OSError) into one line and exit code 2; a lost process: 1.

    The line names options by their flags.
    """
    try:
        yield
    except RuntimeError as error:
        _end_if_lost(error)
        raise
    except (ValueError, OSError) as error:
        fail(in_flags(str(error)) or type(error).__name__)
        raise typer.Exit(BAD_INPUT) from error


@contextmanager
def run_errors(folder: Path, remedy: str) -> Iterator[None]:
    """Turn failures of the system, the device or another process during a run into one line and exit code 1.

    The traceback is written to a file in the folder.
    """
    try:
        yield
    except typer.Exit:  # before RuntimeError, because it is one
        raise
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror}" if error.strerror else str(error)
        fail(f"{what}; files written before are complete: fix this, then {remedy}{_kept_traceback(folder, error)}")
        raise typer.Exit(FAILED) from error
    except (RuntimeError, MemoryError) as error:
        _end_if_lost(error)
        where = "" if known_error(error) else _kept_traceback(folder, error)
        if not where:
            raise
        fail(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}{where}")
        raise typer.Exit(FAILED) from error


def go_on_by(folder: Path) -> str:
    """The command that continues the run in a folder."""
    return f"continue: alignprop-fast train --resume --output-dir {shlex.quote(str(folder))}"


def known_error(error: Exception) -> str:
    """The message for a RuntimeError that the user can mend: of the device, a library or a path; "" for others."""
    from alignprop_fast.ops.errors import is_out_of_memory

    text = str(error)
    if "Could not determine home directory" in text:  # as `Path.expanduser` says it
        return "a path begins with ~, but there is no such user here: write the whole path"
    if "CPU-only version of bitsandbytes" in text:
        why = "bitsandbytes found no CUDA library (python -m bitsandbytes says why)"
        return f"{why}: install it anew, or use --base-dtype fp8 and --optimizer adamw"
    if "does not have a deterministic implementation" in text:
        return f"{text.partition(',')[0]}: leave --deterministic out, or use another reward"
    if not is_out_of_memory(error):
        return ""
    # Torch's first sentences say how much memory is lacking. If a plan was known, the text has the remedy already.
    first = text.partition("\n")[0].partition(" If reserved")[0].removesuffix(".")
    if "no leaner plan" in text:
        return first
    return f"{first}: use a smaller --batch-size or --height and --width, or --base-dtype fp8"


def _end_if_lost(error: Exception) -> None:
    from alignprop_fast.training.processes import ProcessLost

    if isinstance(error, ProcessLost):
        fail(str(error))
        raise typer.Exit(FAILED) from error


def _kept_traceback(folder: Path, error: Exception) -> str:
    """Writes the traceback and returns its path in brackets; "" if it could not be written."""
    file = folder / ERROR_FILE.format(process_index() or "")
    try:
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return f" (traceback: {file})"


def quiet_libraries(console: Console) -> None:
    """Hide the libraries' progress bars and advice, and show this package's own warnings."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging
    from rich.logging import RichHandler

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports CPU kernels that it could not download
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    logging.getLogger("py.warnings").propagate = False
    own = logging.getLogger("alignprop_fast")
    own.handlers = [RichHandler(console=console, show_time=False, show_path=False)]
    own.propagate = False


def pick_device(name: str) -> str:
    """ "cpu", "cuda" or "cuda:N" from an option that may also be "auto"; makes a CUDA device the current one.

    Raises:
        ValueError: the device does not exist, or training does not support it.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    if index and process_count() > 1:
        raise ValueError(f"--device {name} names one GPU, but each process has its own: leave --device out")
    if kind == "cuda":
        if int(index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"there is no device {name}; torch sees {torch.cuda.device_count()} GPUs: use --device cpu"
            )
        torch.cuda.set_device(int(index or 0))
    return name


def budget_here(wanted_bytes: int | None, device: str) -> tuple[str, int, str]:
    """Name of the device, the memory budget on it (all of it if none is asked for), and a note if that is reduced.

    `DifferentiableSampler` later reduces a GPU's budget to what is free, when that is known.

    Raises:
        ValueError: the budget asked for is larger than the device's memory.
    """
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
        ValueError: a file is in the way, or writing is not permitted.
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
    """Refuse a tracker that is not installed, because accelerate would silently run without it.

    Raises:
        ValueError: the tracker is not installed.
    """
    if name is not None and find_spec(name) is None:
        raise ValueError(f"--log-with {name} needs {name}: pip install {name}, or leave the option out")


def existing_as_absolute(value: str, names: Collection[str] = ()) -> str:
    """An existing path made absolute, so that a run can be resumed from another folder; other texts unchanged.

    names: names of this package, which are kept even if a file has that name.
    """
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() and value not in names else value
