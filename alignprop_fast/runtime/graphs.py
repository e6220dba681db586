"""Records a function of tensors once as a CUDA graph and replays it, so that no kernel waits for Python's launch.

Tested on an emulated GPU, not yet measured on a real one. Source: torch.cuda.CUDAGraph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory

logger = logging.getLogger(__name__)

Tensors = Sequence[torch.Tensor]
Results = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class _Recorded:
    """A recorded call: static inputs, static results, and the replay that computes them."""

    inputs: Tensors
    replay: Callable[[], None]
    results: Results


class GraphedCalls:
    """Calls fn(*inputs) as one CUDA graph for each kind of call and each set of input shapes.

    Inputs are copied into static buffers. The results are static too, valid until the next call. All graphs share one
    memory pool, which stays reserved for them: they never run at the same time, and no result is read after the next
    call. So the pool is as large as the largest call, plus the results of the others.

    A graph reads weights at the addresses of its recording, and so their present values. `state` shows whether the
    addresses still hold: a new state drops all graphs.
    """

    def __init__(self) -> None:
        # None: its recording ran out of memory, and is not tried again.
        self._graphs: dict[Hashable, _Recorded | None] = {}
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
            self._graphs.clear()
            self._state, self._pool = state, None
        key = kind, tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._recorded_unless_out_of_memory(fn, inputs)
        recorded = self._graphs[key]
        if recorded is None:
            return None
        with torch.no_grad():
            for buffer, value in zip(recorded.inputs, inputs, strict=True):
                buffer.copy_(value)
        recorded.replay()
        return recorded.results

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether a recording failed."""
        return None in self._graphs.values()

    def _recorded_unless_out_of_memory(self, fn: Callable[..., Results], inputs: Tensors) -> _Recorded | None:
        found = unless_out_of_memory(partial(self._record, fn, inputs))
        if isinstance(found, OutOfMemory):
            logger.warning("no memory to record a CUDA graph, kernels are launched one by one: %s", found.reason)
            return None
        return found

    def _record(self, fn: Callable[..., Results], inputs: Tensors) -> _Recorded:
        with torch.cuda.device_of(inputs[0]):
            buffers = [x.detach().clone() for x in inputs]
            run = partial(fn, *buffers)
            self._warm_up(run)
            return _Recorded(buffers, *self._capture(run))

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
