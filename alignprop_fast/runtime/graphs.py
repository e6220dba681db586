"""Records a function of tensors once as a CUDA graph and replays it, so that no kernel waits for Python's launch.

Tested on an emulated GPU, not yet measured on a real one. Source: torch.cuda.CUDAGraph.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory
from alignprop_fast.ops.versions import version

logger = logging.getLogger(__name__)

Tensors = Sequence[torch.Tensor]
Results = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class _Recorded:
    """A recorded call: static results, and the replay that computes them from the static inputs."""

    replay: Callable[[], None]
    results: Results


class _Buffer:
    """A static input. It is filled only if it holds another tensor, or if that tensor has changed since."""

    def __init__(self, value: torch.Tensor):
        with torch.inference_mode(False):  # a recorded backward pass may save it
            self.memory = torch.empty_like(value)
        self._source: Callable[[], torch.Tensor | None] = _nothing
        self._version = 0

    @torch.no_grad()
    def fill(self, value: torch.Tensor) -> None:
        if self._source() is value and self._version == version(value):
            return
        self.memory.copy_(value)
        # Changes of an inference tensor are not counted, so it is always copied.
        self._source, self._version = _nothing if value.is_inference() else weakref.ref(value), version(value)


def _nothing() -> None:
    return None


class GraphedCalls:
    """Calls fn(*inputs) as one CUDA graph for each kind of call and each set of input shapes.

    Inputs are copied into static buffers, one for each place among the inputs and each layout. The results are static
    too, valid until the next call. All graphs share these buffers and one memory pool, which stays reserved for them:
    they never run at the same time, and no result is read after the next call. So the pool is as large as the largest
    call, plus the results of the others. A new kind of call first runs without a graph, which takes as much memory
    again. So the other graphs are dropped before, and recorded again when they are next called.

    A graph reads weights at the addresses of its recording, and so their present values. `state` shows whether the
    addresses still hold: a new state drops all graphs.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, _Recorded] = {}
        self._buffers: dict[Hashable, _Buffer] = {}
        self._warm: set[Hashable] = set()  # calls whose kernels are compiled and chosen
        self._failed: set[Hashable] = set()  # calls whose recording ran out of memory, and is not tried again
        self._state: Hashable = None
        self._pool: Any = None
        # One stream for all warm-ups and recordings, because cuBLAS keeps a workspace for each stream it has met.
        self._stream: torch.cuda.Stream | None = None

    def __call__(
        self, fn: Callable[..., Results], inputs: Tensors, state: Hashable, kind: Hashable = None
    ) -> Results | None:
        """fn(*inputs), or None if its recording runs out of memory.

        state: everything that fn reads besides its inputs, as addresses and settings. kind: what else tells calls
        apart, such as what is kept for the backward pass inside fn.
        """
        if state != self._state:
            self._drop_graphs()
            self._buffers, self._warm, self._failed, self._state = {}, set(), set(), state
        layouts = [(place, x.shape, x.stride(), x.dtype) for place, x in enumerate(inputs)]
        key = kind, *layouts
        if key in self._failed:
            return None
        if key not in self._graphs:
            found = unless_out_of_memory(partial(self._record, key, fn, layouts, inputs))
            if isinstance(found, OutOfMemory):
                logger.warning("no memory to record a CUDA graph, kernels are launched one by one: %s", found.reason)
                self._failed.add(key)
                return None
            self._graphs[key] = found
        self._filled(layouts, inputs)
        self._graphs[key].replay()
        return self._graphs[key].results

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether a recording failed."""
        return bool(self._failed)

    def _drop_graphs(self) -> None:
        self._graphs.clear()
        self._pool = None

    def _filled(self, layouts: Sequence[Hashable], inputs: Tensors) -> list[torch.Tensor]:
        """The static inputs of these layouts, with the values of the inputs."""
        for layout, value in zip(layouts, inputs, strict=True):
            if layout not in self._buffers:
                self._buffers[layout] = _Buffer(value)
            self._buffers[layout].fill(value)
        return [self._buffers[layout].memory for layout in layouts]

    def _record(
        self, key: Hashable, fn: Callable[..., Results], layouts: Sequence[Hashable], inputs: Tensors
    ) -> _Recorded:
        with torch.cuda.device_of(inputs[0]):
            run = partial(fn, *self._filled(layouts, inputs))
            if key not in self._warm:
                self._drop_graphs()
                self._warm_up(run)
                self._warm.add(key)
            return _Recorded(*self._capture(run))

    def _warm_up(self, run: Callable[[], Results]) -> None:
        """Two runs that are not recorded, in which kernels are compiled and chosen."""
        side, main = self._side_stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        main.wait_stream(side)

    def _capture(self, run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """(replay, static results) of the run."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Calls of other threads to the driver (NCCL's watchdog queries events) are not part of the recording.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream(), capture_error_mode="thread_local"):
            results = run()
        return graph.replay, results

    def _side_stream(self) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream
