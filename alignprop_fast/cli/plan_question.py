"""The input of `plan`: cost tables, from a model or from a file, and the budget of a device."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignprop_fast.cli import kept_tables
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.parts import open_model, open_rewards, resolved, tell_sampler
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
from alignprop_fast.prompts.rows import load_rows
from alignprop_fast.training.declaration import flag
from alignprop_fast.training.options import TrainOptions

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
    if idle := [name for name in given if name not in kept_tables.BESIDE_TABLE]:
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
    tables = kept_tables.read(chosen) if place.is_named else None
    if tables is None:
        with nullcontext() if place.gpu is None else _estimating():
            quiet_libraries(console)
            sampler = sampler_to_plan(chosen, config, place.device)
            start = time.perf_counter()
            tables = _tables(console, sampler, batch, chosen.negative_prompt, place.gpu)
        if place.gpu is None:
            say_measured(console, time.perf_counter() - start)
        if place.device.startswith("cuda"):  # the free memory is known only after everything was measured
            held_bytes, note = sampler.settled_budget(batch, chosen.negative_prompt), sampler.budget_note
            budget_bytes = budget_bytes if held_bytes is None else held_bytes
        if place.is_named and _is_known(chosen):
            kept_tables.keep(chosen, tables)
    if place.gpu is not None:
        host_bytes = lockable_bytes(None if config.host_memory is None else int(config.host_memory))
        tables = {size: replace(table, host_limit_bytes=host_bytes) for size, table in tables.items()}
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

    is_named: whether the GPU is that of --gpu, whose data sheet does not depend on this computer.
    precision: the meaning of --mixed-precision auto there.
    """

    device: str
    gpu: Gpu | None
    is_named: bool = False

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
        return _Place("meta", _gpu(options.gpu), is_named=options.gpu is not None)
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
    """With --resolution as height and width."""
    if options.resolution is None:
        return options
    if options.height or options.width:
        raise ValueError("--resolution sets --height and --width: give it or them, not both")
    return replace(options, height=options.resolution, width=options.resolution)


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


def sampler_to_plan(options: TrainOptions, config: AlignPropConfig, device: str) -> DifferentiableSampler:
    """The sampler that training makes from these options."""
    import torch

    from alignprop_fast.models.architectures import NAMES
    from alignprop_fast.training.prepare import make_sampler, prepare_model

    if options.model in NAMES and device != "meta":
        raise ValueError(f"{options.model} is an architecture without weights: give --measure a folder or a Hub id")
    row = load_rows(options.prompts)[0]
    rewards = open_rewards(options, device)
    if not device.startswith("cuda"):  # the budget is not this computer's free memory
        config = replace(config, memory_budget=None)
    pipeline = open_model(options, device)
    prepare_model(pipeline, torch.device(device), config)
    sampler = make_sampler(pipeline, config, rewards.trained)
    tell_sampler(sampler, rewards, row)
    return sampler


def _is_known(options: PlanOptions) -> bool:
    """Whether this package and local files determine the tables: no model of the Hub and no function of the user."""
    from alignprop_fast.models.architectures import NAMES
    from alignprop_fast.rewards.registry import parsed_spec
    from alignprop_fast.rewards.user_function import is_function_name

    specs = [spec for spec in (options.reward, options.watch_reward) if spec]
    parts = [name for spec in specs for name, _ in parsed_spec(spec, [])[0]]
    return (options.model in (*NAMES, "demo") or Path(options.model).expanduser().exists()) and not any(
        map(is_function_name, parts)
    )


@contextmanager
def _estimating() -> Iterator[None]:
    """Inside, an estimate does without what serves others and costs it seconds.

    - The compiler: libraries (bitsandbytes) load it to compile functions when they are imported. It takes longer to
      load than everything else, and an estimate compiles nothing.
    - Threads: counting has no data to share among them, and on a busy machine they would wait for each other.
    - The garbage collector: it would look through all objects of the libraries and the model ten times. What an
      estimate drops is freed without it.
    """
    name = "TORCHDYNAMO_DISABLE"
    added, collects = name not in os.environ, gc.isenabled()
    os.environ.setdefault(name, "1")
    gc.disable()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()
        if added:
            del os.environ[name]


def _tables(
    console: Console, sampler: DifferentiableSampler, batch: int, negative_prompt: str | None, gpu: Gpu | None
) -> dict[int, CostTable]:
    """The tables of two batch sizes, or only of `batch` if the device lacks the memory for the other one."""
    from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory

    how = "measuring" if gpu is None else "counting operators"
    tables: dict[int, CostTable] = {}
    with Waiting(console, how, parts=2) as waiting:
        for size in kept_tables.batches(batch):
            table = unless_out_of_memory(partial(sampler.cost_table, size, gpu, negative_prompt, waiting.next_part()))
            if not isinstance(table, OutOfMemory):
                tables[size] = table
            elif size == batch:
                raise ValueError(f"{table.reason} at batch size {batch}: use a smaller --batch-size or --resolution")
    return tables
