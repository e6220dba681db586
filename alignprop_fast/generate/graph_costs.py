"""Chooses how evaluations run, by timing them at first use: kernel by kernel, compiled, or recorded as CUDA graphs.

The times are remembered beside the cost table of the same step, under the same key.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch

from alignprop_fast.files import write_whole
from alignprop_fast.generate.cost_table import TrainingStep, cache_file, latents, step_origin
from alignprop_fast.generate.denoising import DenoisingChain
from alignprop_fast.planner import CountedGraphs, GraphCosts, leanest
from alignprop_fast.runtime import (
    OutOfMemory,
    Stopwatch,
    allocated_bytes,
    apply_options,
    device_name,
    first_line,
    step_gradients,
    unless_out_of_memory,
)

logger = logging.getLogger(__name__)

REPEATS = 3
ORDERED = 0.99  # graphs that the user ordered count as a little faster, whatever was measured
ONE_BY_ONE = {"eager": False, "compiled": True}  # ways to run an evaluation, and whether its blocks are compiled
AS_GRAPHS = {"graphs": False, "compiled graphs": True}


def graph_costs(step: TrainingStep) -> GraphCosts | None:
    """What CUDA graphs save and take in such a step; None if there are none.

    It also sets whether compiled blocks, where the user allows them, are used.
    """
    fast = step.chain.fast
    if fast is None:
        return None
    seconds = _remembered(step)
    evaluations = {way: seconds[way] for way in (*ONE_BY_ONE, *AS_GRAPHS) if way in seconds}
    best = min(evaluations, key=evaluations.__getitem__, default="eager")
    fast.compiled_pays = {**ONE_BY_ONE, **AS_GRAPHS}[best]
    recorded = [seconds[way] for way in AS_GRAPHS if way in seconds]
    if not recorded:
        return None
    sampling = min(recorded) / min(seconds[way] for way in ONE_BY_ONE if way in seconds)
    return _costs(step, sampling, seconds.get("replay graphs", 1.0) / seconds.get("replay eager", 1.0))


def counted_graphs(step: TrainingStep) -> CountedGraphs | None:
    """The same where nothing is timed."""
    fast = step.chain.fast
    if fast is None or step.chain.fast_state is None:
        return None
    replays = step.chain.gradient_sink is None
    return CountedGraphs(_static_bytes(step), replays, ORDERED if fast.by_order else 1.0)


def _costs(step: TrainingStep, sampling: float, replay: float) -> GraphCosts:
    if step.chain.fast is not None and step.chain.fast.by_order:
        sampling, replay = min(sampling, ORDERED), min(replay, ORDERED)
    return GraphCosts(sampling, replay, _static_bytes(step))


def _remembered(step: TrainingStep) -> Mapping[str, float]:
    """Seconds of each way to run an evaluation or a replay that can be had here; measured at first use."""
    origin = {**step_origin(step), "source": "ways", "device": device_name(step.model.device)}
    path = cache_file({**origin, "ways": ", ".join(_evaluations(step.chain))})
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass  # not there, or damaged
    try:
        with step.chain.reading():
            seconds = unless_out_of_memory(partial(_measured, step))
    except RuntimeError as error:
        if step.chain.fast is not None and step.chain.fast.by_order:
            raise
        seconds = OutOfMemory(first_line(error))
    if isinstance(seconds, OutOfMemory):
        logger.warning("evaluations are launched kernel by kernel, since other ways fail here: %s", seconds.reason)
        return {}
    with suppress(OSError):  # the next process measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(seconds).encode())
    logger.info("ways to run a step, in ms: %s", ", ".join(f"{way} {1e3 * s:.1f}" for way, s in seconds.items()))
    return seconds


def _measured(step: TrainingStep) -> dict[str, float]:
    chain, x = step.chain, step.chain.start(latents(step))
    assert chain.fast is not None
    seconds: dict[str, float] = {}
    try:
        for way in _evaluations(chain):
            seconds[way] = _timed(step, partial(_evaluate, chain, x, way))
        if chain.fast_state is not None and chain.gradient_sink is None:
            with torch.no_grad():
                gy = torch.zeros_like(chain.predict(0, x))
            for way, recorded in (("replay eager", False), ("replay graphs", True)):
                seconds[way] = _timed(step, partial(_replay, chain, x, gy, recorded))
        if chain.fast.graphs is not None and chain.fast.graphs.ran_out_of_memory:
            raise torch.OutOfMemoryError("out of memory while CUDA graphs were recorded")
        return seconds
    finally:
        chain.fast.forget_recordings()


def _evaluations(chain: DenoisingChain) -> list[str]:
    """The ways that can be had."""
    assert chain.fast is not None
    ways = {**ONE_BY_ONE, **({} if chain.fast_state is None else AS_GRAPHS)}
    return [way for way, compiled in ways.items() if chain.fast.compiled is not None or not compiled]


@torch.inference_mode()
def _evaluate(chain: DenoisingChain, x: torch.Tensor, way: str) -> None:
    assert chain.fast is not None
    chain.fast.compiled_pays = {**ONE_BY_ONE, **AS_GRAPHS}[way]
    chain.sample(0, x, way in AS_GRAPHS)


@torch.enable_grad()
def _replay(chain: DenoisingChain, x: torch.Tensor, gy: torch.Tensor, recorded: bool) -> None:
    """One gradient step under the leanest plan's options, forward and back."""
    options = leanest(1, (0,)).replay_options
    x = x.detach().requires_grad_()
    with apply_options(options, chain.blocks):
        if recorded:
            chain.recorded_gradients(0, x, gy, options)
            return
        y = chain.predict(0, x)
    step_gradients(y, [*chain.receivers, x], gy)


def _timed(step: TrainingStep, run: Callable[[], None]) -> float:
    """Median seconds of a run, without the first one, which compiles and records."""
    run()
    runs = []
    for _ in range(REPEATS):
        watch = Stopwatch(step.model.device)
        watch.enter("run")
        run()
        runs.append(watch.seconds()["run"])
    return statistics.median(runs)


def _static_bytes(step: TrainingStep) -> int:
    """Inputs of both graphs (latents, time, conditioning, the gradient of the output), and their outputs."""
    x = latents(step)
    latents_bytes = allocated_bytes(x.numel() * x.element_size(), x.device)
    held = [*step.cond.tensors(), *step.chain.texts.tensors()]
    held_bytes = sum(allocated_bytes(t.numel() * t.element_size(), t.device) for t in held)
    return held_bytes + allocated_bytes(8, x.device) + (2 + 2 * step.cond.branches) * latents_bytes
