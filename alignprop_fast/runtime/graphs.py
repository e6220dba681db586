"""A function of tensors recorded once as a CUDA graph and replayed, so that no step waits for Python to launch it.

Not tried on a GPU yet. Source: torch.cuda.CUDAGraph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

Run = Callable[[], torch.Tensor]


class GraphedCalls:
    """Calls fn(*inputs) without gradient, by a graph for each set of input shapes.

    Inputs are copied into static buffers, and the output is one: it holds until the next call. All graphs share one
    memory pool, which stays reserved; they never run at the same time, and no output is read after the next call.
    What fn reads beside its inputs (weights) must lie where it lay: `state` says so, and a new state drops all graphs.
    Weights that an optimizer updates in place are read anew at each replay.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[list[torch.Tensor], Callable[[], None], torch.Tensor]] = {}
        self._state: Hashable = None
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(
        self, fn: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], state: Hashable
    ) -> torch.Tensor:
        """fn(*inputs). state: everything that fn depends on beside its inputs' values."""
        if state != self._state:
            self._graphs.clear()
            self._state, self._pool = state, None
        key = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        if key not in self._graphs:
            buffers = [x.clone() for x in inputs]
            self._graphs[key] = (buffers, *self._capture(lambda: fn(*buffers)))
        buffers, replay, output = self._graphs[key]
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)
        replay()
        return output

    def _capture(self, run: Run) -> tuple[Callable[[], None], torch.Tensor]:
        """(replay, static output) of the run, after two that are not recorded, where kernels are made and chosen."""
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        main.wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        return graph.replay, output
