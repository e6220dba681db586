"""The emulated GPU's current device and its streams: what a task would have waited for on a real one."""

import contextlib
import time


class Current:
    """The current device. All tensors are on device 0, so allocating or measuring on another one is an error."""

    def __init__(self):
        self.index = 0

    def exchange(self, index: int) -> int:
        before, self.index = self.index, index if index >= 0 else self.index
        return before

    def set(self, device) -> None:
        import torch

        self.index = torch.device("cuda", device).index if isinstance(device, int) else torch.device(device).index or 0

    def check(self, device=None) -> None:
        import torch

        index = None if device is None else device if isinstance(device, int) else torch.device(device).index
        if (self.index if index is None else index) != 0:
            raise RuntimeError("on cuda:1, where nothing runs: the device was not named")


current = Current()


class Stream:
    """A stream. All work runs in the order of the calls, on every stream.

    `seen` tells what a GPU would have finished before this stream's next task: for each stream, a number of tasks.
    """

    made = 0
    current: "Stream"

    def __init__(self, device=None, priority=0):
        import torch

        current.check(device)
        self.device = torch.device("cuda", 0)
        self.cuda_stream = 0
        self.number, Stream.made = Stream.made, Stream.made + 1
        self.seen = {self.number: 0}

    def work(self) -> tuple[int, int]:
        """Add a task to the stream; returns (stream, number of the task)."""
        self.seen[self.number] += 1
        return self.number, self.seen[self.number]

    def comes_after(self, work: tuple[int, int]) -> bool:
        """Whether a task given to the stream now would wait for that one."""
        return self.seen.get(work[0], 0) >= work[1]

    def wait_stream(self, stream) -> None:
        self._wait(stream.seen)

    def wait_event(self, event) -> None:
        self._wait(event.seen)

    def _wait(self, seen) -> None:
        self.seen = {number: max(self.seen.get(number, 0), seen.get(number, 0)) for number in {**self.seen, **seen}}

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event


@contextlib.contextmanager
def on_stream(stream):
    before, Stream.current = Stream.current, stream or Stream.current
    try:
        yield
    finally:
        Stream.current = before


class Event:
    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self._seconds = 0.0
        self.seen: dict[int, int] = {}  # an event that was never recorded waits for nothing

    def record(self, stream=None) -> None:
        current.check(None if stream is None else stream.device)
        self._seconds = time.perf_counter()
        self.seen = dict((stream or Stream.current).seen)

    def elapsed_time(self, end: "Event") -> float:
        return (end._seconds - self._seconds) * 1000

    def wait(self, stream=None) -> None:
        (stream or Stream.current).wait_event(self)

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True
