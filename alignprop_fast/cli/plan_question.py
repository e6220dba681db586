"""The input of `plan`: cost tables, from a model or from a file, and the budget of a device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignprop_fast.cli.counting import Counting
from alignprop_fast.cli.kept_counts import BESIDE_COUNTS, batches
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.parts import open_rewards, open_sampler, resolved
from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.cli.plan_summary import Prediction, predict
from alignprop_fast.cli.screen import Waiting, say_measured
from alignprop_fast.cli.support import budget_here, pick_device, quiet_libraries
from alignprop_fast.planner import (
    AUTO,
    GPUS,
    BudgetInfeasible,
    CostTable,
    Gpu,
    budget_on,
    find_gpu,
    largest_batch,
    load_table,
    lockable_bytes,
    scaled,
)
from alignprop_fast.training.declaration import flag

if TYPE_CHECKING:
    from alignprop_fast.generate.sampler import DifferentiableSampler
    from alignprop_fast.training.config import AlignPropConfig


@dataclass(frozen=True)
class Question:
    """tables: by batch size, including `batch`; a second one allows a linear fit to other sizes."""

    tables: Mapping[int, CostTable]
    batch: int
    num_steps: int
    truncation: str
    budget_bytes: int
    title: str
    note: str
    facts: Mapping[str, Any]

    def predict(self) -> Prediction:
        """The plan.

        Raises:
            ValueError: nothing fits. The message names the least budget, what would lower it, and a batch size that
            fits.
        """
        try:
            table = self.tables[self.batch]
            prediction = predict(table, self.num_steps, self.truncation, self.batch, self.budget_bytes)
        except BudgetInfeasible as error:
            if largest := self._largest():
                raise ValueError(f"{error}; batch size {largest} fits without other changes") from error
            raise
        largest = self._largest()
        return replace(prediction, largest=None if largest is None else max(largest, self.batch))

    def _largest(self) -> int | None:
        """The largest batch size that fits in the worst case, 0 if none; None if a single table allows no fit."""
        from alignprop_fast.sampling.draw import gate_count

        if len(self.tables) < 2:
            return None
        (small, one), (large, two) = sorted(self.tables.items())
        grad_steps = gate_count(self.truncation, self.num_steps)[0]
        return largest_batch(
            lambda batch: scaled(one, two, small, large, batch), self.num_steps, grad_steps, self.budget_bytes
        )


def from_table(options: PlanOptions, file: Path, given: Sequence[str]) -> Question:
    """The question about a saved table. given: names of the options on the command line.

    Raises:
        ValueError: the table or the budget is bad, or an option is given that the table determines.
    """
    if idle := [name for name in given if name not in BESIDE_COUNTS]:
        raise ValueError(f"{flag(idle[0])} is determined by --table: leave it out, or estimate without --table")
    table = load_table(file)
    # Tables of earlier versions do not say the steps, whose default was 50 then.
    steps = options.num_inference_steps or int(table.origin.get("steps", 50))
    config = make_config(resolved(replace(options, num_inference_steps=steps), "no"), "cpu", "")
    wanted_bytes = _wanted_bytes(config)
    if config.host_memory is not None:
        table = replace(table, host_limit_bytes=int(config.host_memory))
    origin = table.origin
    device = origin.get("device", "an unknown device").partition(",")[0]
    try:
        budget_bytes, note = budget_on(device, find_gpu(device).memory_bytes, wanted_bytes)
    except ValueError as error:
        if "unknown GPU" not in str(error):
            raise
        if wanted_bytes is None:
            raise ValueError(f"the memory of {device} is not known: give --memory-budget") from error
        budget_bytes, note = wanted_bytes, ""
    batch = int(origin.get("batch", 1))
    facts = {
        "model": origin.get("model"),
        "gpu": device,
        "source": origin.get("source"),
        "truncation": options.truncation,
        "table": str(file),
    }
    return Question(
        tables={batch: table},
        batch=batch,
        num_steps=config.sample_num_steps,
        truncation=options.truncation,
        budget_bytes=budget_bytes,
        title=f"table {file.name}: {origin.get('model', 'a model')}, batch {batch}, {device}",
        note=note,
        facts=facts,
    )


def from_model(console: Console, options: PlanOptions) -> Question:
    """The question about a model. Its tables are measured now, or estimated, now or for an earlier question.

    Raises:
        ValueError, OSError: bad input, one line each.
    """
    from alignprop_fast.sampling.draw import gate_count

    chosen, place = _sized(options), _place(options)
    precision = place.precision if chosen.mixed_precision == "auto" else chosen.mixed_precision
    chosen = resolved(chosen, precision)
    config = make_config(chosen, place.device, "")
    wanted_bytes, steps, batch = _wanted_bytes(config), config.sample_num_steps, chosen.batch_size
    gate_count(chosen.truncation, steps)
    name, budget_bytes, note = place.budget(wanted_bytes)
    if place.gpu is None:
        quiet_libraries(console)
        sampler = open_sampler(chosen, config, place.device, open_rewards(chosen, place.device))
        tables = _measured(console, sampler, batch, chosen.negative_prompt)
        if place.device.startswith("cuda"):  # the free memory is known only after everything was measured
            held_bytes, note = sampler.settled_budget(batch, chosen.negative_prompt), sampler.budget_note
            budget_bytes = budget_bytes if held_bytes is None else held_bytes
    else:
        host_bytes = lockable_bytes(None if config.host_memory is None else int(config.host_memory))
        counted = Counting(console, chosen, config, place.gpu).tables()
        tables = {size: replace(one.on(place.gpu), host_limit_bytes=host_bytes) for size, one in counted.items()}
    height, width = (int(tables[batch].origin[side]) for side in ("height", "width"))
    source = "measured" if place.gpu is None else "estimated"
    facts = {
        "model": chosen.model,
        "gpu": name,
        "source": source,
        "reward": chosen.reward,
        "truncation": chosen.truncation,
        "height": height,
        "width": width,
    }
    title = (
        f"{chosen.model} at {width} x {height}, batch {batch}, {steps} steps, reward {chosen.reward}, on {name} "
        f"({source})"
    )
    return Question(tables, batch, steps, chosen.truncation, budget_bytes, title, note, facts)


@dataclass(frozen=True)
class _Place:
    """Where a training step is measured, or for which GPU it is estimated. device: a torch device; "meta" estimates.

    precision: the meaning of --mixed-precision auto there.
    """

    device: str
    gpu: Gpu | None

    @property
    def precision(self) -> str:
        return "no" if self.device == "cpu" else "bf16"

    def budget(self, wanted_bytes: int | None) -> tuple[str, int, str]:
        """Name of the device, the memory budget on it, and a note if it is smaller than the one asked for."""
        if self.gpu is None:
            return budget_here(wanted_bytes, self.device)
        return self.gpu.name, *budget_on(self.gpu.name, self.gpu.memory_bytes, wanted_bytes)


def _place(options: PlanOptions) -> _Place:
    if not options.measure:
        return _Place("meta", _gpu(options.gpu))
    import torch

    from alignprop_fast.training.placement import make_deterministic

    if options.gpu is not None:
        raise ValueError("--measure uses this computer's device: leave out --gpu, or --measure")
    if options.deterministic and torch.cuda.is_available():
        make_deterministic()  # other kernels, with other costs
    device = pick_device("auto")
    if options.mixed_precision == "fp16" and device == "cpu":
        raise ValueError("--mixed-precision fp16 needs a GPU: use no or bf16")
    return _Place(device, None)


def _sized(options: PlanOptions) -> PlanOptions:
    """With --resolution as height and width, which say it all."""
    if options.resolution is None:
        return options
    if options.height or options.width:
        raise ValueError("--resolution sets --height and --width: give it or them, not both")
    return replace(options, height=options.resolution, width=options.resolution, resolution=None)


def _wanted_bytes(config: AlignPropConfig) -> int | None:
    """--memory-budget; None: auto."""
    if config.memory_budget is None:
        raise ValueError("--memory-budget none makes no plan: give a size, or auto")
    return None if config.memory_budget == AUTO else int(config.memory_budget)


def _gpu(name: str | None) -> Gpu:
    if name is not None:
        return find_gpu(name)
    import torch

    known = ", ".join(gpu.name for gpu in GPUS)
    if not torch.cuda.is_available():
        raise ValueError(f"this computer has no GPU to plan for: name one by --gpu; known are {known}")
    here = torch.cuda.get_device_name()
    try:
        return find_gpu(here)
    except ValueError as error:
        raise ValueError(
            f"there is no data sheet of this computer's GPU, {here}: use --measure, or --gpu with one of {known}"
        ) from error


def _measured(
    console: Console, sampler: DifferentiableSampler, batch: int, negative_prompt: str | None
) -> dict[int, CostTable]:
    """The tables of two batch sizes, or only of `batch` if the device lacks the memory for the other one."""
    from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory

    start, tables = time.perf_counter(), dict[int, CostTable]()
    with Waiting(console, "measuring", parts=2) as waiting:
        for size in batches(batch):
            table = unless_out_of_memory(partial(sampler.cost_table, size, None, negative_prompt, waiting.next_part()))
            if not isinstance(table, OutOfMemory):
                tables[size] = table
            elif size == batch:
                raise ValueError(f"{table.reason} at batch size {batch}: use a smaller --batch-size or --resolution")
    say_measured(console, time.perf_counter() - start)
    return tables
