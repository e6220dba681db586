"""Records a function of tensors once as CUDA graphs and replays them, so that no step waits for Python's launches.

Experimental: tested on an emulated GPU, not yet measured on a real one. Source: torch.cuda.CUDAGraph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class _Recorded:
    """A recorded call: static inputs, static output, and the replay that computes it. With gradient also the static
    gradient of the output, and the resulting gradients, concatenated in one tensor, with their shapes."""

    inputs: list[torch.Tensor]
    forward: Callable[[], None]
    output: torch.Tensor
    gradient: torch.Tensor | None = None
    backward: Callable[[], None] | None = None
    flat: torch.Tensor | None = None
    shapes: Sequence[torch.Size | None] = ()


class GraphedCalls:
    """Calls fn(*inputs) by a graph per set of input shapes, or with gradient by two: one forward, one backward.

    Inputs are copied into static buffers. The output is a static buffer too, valid until the next call. All graphs
    share one memory pool, which stays reserved; they never run at the same time, and no output is read after the next
    call. Weights and other tensors that fn reads must keep their addresses. `state` shows that, and a new state drops
    all graphs. Each replay reads the present values of weights that an optimizer updates in place.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, _Recorded] = {}
        self._state: Hashable = None
        self._pool: Any = None
        # One stream for all warm-ups and recordings, because cuBLAS keeps a workspace for each stream it has met.
        self._stream: torch.cuda.Stream | None = None

    @torch.inference_mode()
    def __call__(
        self, fn: Callable[..., torch.Tensor], inputs: Tensors, state: Hashable, how: Hashable = None
    ) -> torch.Tensor:
        """fn(*inputs) without gradient.

        state: everything that fn depends on besides its inputs' values. how: settings of this call that change only
        its own recording.
        """
        key = self._key(("without gradient", how), inputs, state)
        if key not in self._graphs:
            buffers = [x.clone() for x in inputs]
            with torch.cuda.device_of(inputs[0]):
                self._warm_up(lambda: fn(*buffers))
                self._graphs[key] = _Recorded(buffers, *self._capture(lambda: fn(*buffers)))
        recorded = self._graphs[key]
        _fill(recorded.inputs, inputs)
        recorded.forward()
        return recorded.output

    def with_gradient(
        self,
        fn: Callable[..., torch.Tensor],
        inputs: Tensors,
        parameters: Tensors,
        state: Hashable,
        how: Hashable = None,
    ) -> torch.Tensor:
        """fn(*inputs) with gradient for its first input, if that requires one, and for the parameters that fn reads.

        how: settings of this call that change only its own recording: what is kept for the backward pass.
        """
        key = self._key((how, inputs[0].requires_grad), inputs, state)
        if key not in self._graphs:
            with torch.cuda.device_of(inputs[0]):
                self._graphs[key] = self._recorded_with_gradient(fn, inputs, parameters)
        return _WithGradient.apply(self._graphs[key], len(inputs), *inputs, *parameters)

    def _key(self, kind: Hashable, inputs: Tensors, state: Hashable) -> Hashable:
        if state != self._state:
            self._graphs.clear()
            self._state, self._pool = state, None
        return kind, tuple((x.shape, x.stride(), x.dtype) for x in inputs)

    def _recorded_with_gradient(
        self, fn: Callable[..., torch.Tensor], inputs: Tensors, parameters: Tensors
    ) -> _Recorded:
        buffers = [x.detach().clone() for x in inputs]
        buffers[0].requires_grad_(inputs[0].requires_grad)
        wanted = [t for t in (buffers[0], *parameters) if t.requires_grad]
        shapes: list[torch.Size | None] = []

        def forward() -> torch.Tensor:
            with torch.enable_grad():
                return fn(*buffers)

        def back(y: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
            found = torch.autograd.grad(y, wanted, g, allow_unused=True)
            shapes[:] = [None if t is None else t.shape for t in found]
            # One tensor is copied out in one launch. Sums over steps are in fp32 or wider.
            return torch.cat(
                [t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in found if t is not None]
            )

        def both() -> torch.Tensor:
            y = forward()
            return back(y, torch.zeros_like(y))

        self._warm_up(both)
        run_forward, output = self._capture(forward)
        gradient = torch.zeros_like(output)
        run_backward, flat = self._capture(lambda: back(output, gradient))
        return _Recorded(buffers, run_forward, output.detach(), gradient, run_backward, flat, tuple(shapes))

    def _warm_up(self, run: Callable[[], torch.Tensor]) -> None:
        """Two runs that are not recorded, in which kernels are compiled and chosen."""
        side, main = self._side_stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        main.wait_stream(side)

    def _capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """(replay, static output) of the run."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Calls of other threads to the driver (NCCL's watchdog queries events) are not part of the recording.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream(), capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output

    def _side_stream(self) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream


class _WithGradient(torch.autograd.Function):
    """A recorded call as a node of autograd's graph: (recorded, count of inputs, *inputs, *parameters) -> output."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.recorded, ctx.count = recorded, count
        _fill(recorded.inputs, tensors[:count])
        recorded.forward()
        # A new tensor, because autograd would keep the static one as this call's result.
        return recorded.output.view_as(recorded.output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recorded: _Recorded = ctx.recorded
        assert recorded.gradient is not None and recorded.backward is not None and recorded.flat is not None
        recorded.gradient.copy_(grads[0])
        recorded.backward()
        pieces = _pieces(recorded.flat.clone(), recorded.shapes)
        first = next(pieces) if ctx.needs_input_grad[2] else None
        return None, None, first, *[None] * (ctx.count - 1), *pieces


def _pieces(flat: torch.Tensor, shapes: Sequence[torch.Size | None]) -> Iterator[torch.Tensor | None]:
    start = 0
    for shape in shapes:
        if shape is None:
            yield None
            continue
        yield flat[start : start + shape.numel()].view(shape)
        start += shape.numel()


@torch.no_grad()
def _fill(buffers: Tensors, values: Tensors) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
