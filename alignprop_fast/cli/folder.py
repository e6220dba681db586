"""The folder that a command writes to. The command locks it before it does anything else."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from alignprop_fast.cli.support import check_writable, fail, process_count, process_index

LOCK = ".alignprop-fast.lock"
TRACKER = "alignprop-fast"  # project name in trackers, which write to a folder of that name
_HELD = (errno.EACCES, errno.EAGAIN)  # errors of flock if another process holds the lock
_ATTEMPTS = 100  # an attempt fails only if another run ends at that moment


class OutputFolder:
    """A folder that only this process writes to, from `__enter__` until the process ends in any way.

    The operating system locks a file in the folder, and releases the lock of a killed process. If the set-up fails, the
    folders it made are removed again: the tracker's folder, if this one was new, and new folders that are then empty.
    Files of others, such as a log, are kept. After `begin` everything is kept.

    several: whether several processes may form one run, whose main process then takes the folder.
    """

    def __init__(self, path: str | Path, several: bool = False):
        self.path, self._several = Path(path).expanduser(), several
        self._handle: int | None = None
        self._made: list[Path] = []  # new folders, the outermost first
        self._begun = False
        self._refusal: ValueError | OSError | None = None

    def __enter__(self) -> OutputFolder:
        """Take the folder. `check` raises the error if that failed, because several processes must meet first."""
        if process_count() > 1 and not self._several:
            self._refusal = ValueError("only train runs in several processes: start this command without a launcher")
        elif process_index() == 0:
            try:
                self._take()
            except (ValueError, OSError) as error:
                self._refusal = error
            except BaseException:  # a signal
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is None:
            return
        if self._made and not self._begun:
            shutil.rmtree(self.path / TRACKER, ignore_errors=True)
        with suppress(OSError):
            (self.path / LOCK).unlink()  # before the lock is released, since another run may then own the file
        for folder in reversed(self._made):
            with suppress(OSError):  # already removed, or not empty
                folder.rmdir()
        os.close(self._handle)
        self._handle = None

    def check(self) -> None:
        """Raises:
        ValueError: a file is in the way, writing is not permitted, or another run writes there.
        """
        if self._refusal is not None:
            raise self._refusal

    def check_new(self) -> None:
        """Raises:
        ValueError: as `check`, or the folder is not empty.
        """
        self.check()
        if any(entry.name != LOCK for entry in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty: choose another --output-dir")

    def begin(self) -> None:
        """End the set-up: from now on everything in the folder is kept."""
        self._begun = True

    def _take(self) -> None:
        try:
            str(self.path.absolute()).encode()
        except UnicodeEncodeError:  # a picture's title and a model card could not hold it
            raise ValueError(f"the name {str(self.path)!r} is not UTF-8: choose another --output-dir") from None
        check_writable(self.path)
        for _ in range(_ATTEMPTS):
            try:
                self._made = [path for path in (self.path, *self.path.parents) if not path.exists()][::-1]
                self.path.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another run's set-up failed and has just removed the folder
                continue
            except OSError as error:
                raise ValueError(
                    f"cannot write to {self.path} ({error.strerror}): choose another --output-dir"
                ) from error
            if not self._lock(handle):
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
                os.close(handle)
                raise ValueError(
                    f"another run writes to {self.path}{holder and f' ({holder})'}: wait for it, or choose another "
                    "--output-dir"
                )
            if _is_at(handle, self.path / LOCK):
                break
            os.close(handle)  # another run has ended and has just removed the file
        else:
            raise ValueError(f"cannot lock {self.path}, which other runs make and remove: choose another --output-dir")
        self._handle = handle
        with suppress(OSError):
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _lock(self, handle: int) -> bool:
        """Lock the file as long as this process holds it open; False if another process has locked it."""
        try:
            import fcntl
        except ImportError:  # Windows, which training does not support
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            fail(f"{self.path} cannot be locked ({error.strerror}): let no other run write there")
        return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
