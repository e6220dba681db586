"""What `plan` is asked: cost tables, from a model or from a file, and the budget of a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignprop_fast.cli.plan_summary import Prediction, predict
from alignprop_fast.cli.support import budget_here, pick_device
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
    parse_budget,
    parse_bytes,
    scaled,
)

if TYPE_CHECKING:
    from alignprop_fast.generate.sampler import DifferentiableSampler

# What --table leaves to say; everything else is in the table.
_BESIDE_TABLE = {
    *("num_inference_steps", "truncation", "memory_budget", "host_memory"),
    *("table", "save_table", "json", "output_dir"),
}


@dataclass(frozen=True)
class Question:
    """tables: by batch size, that of `batch` among them; a second one gives the line to other sizes."""

    tables: Mapping[int, CostTable]
    batch: int
    num_steps: int
    truncation: str
    budget_bytes: int
    title: str
    note: str
    facts: Mapping[str, Any]

    def predict(self) -> Prediction:
        """The answer.

        Raises:
            ValueError: nothing fits; names the least budget, what would lower it, and a batch size that fits.
        """
        try:
            table = self.tables[self.batch]
            prediction = predict(table, self.num_steps, self.truncation, self.batch, self.budget_bytes)
        except BudgetInfeasible as error:
            if largest := self._largest():
                raise ValueError(f"{error}; batch size {largest} fits as it is") from error
            raise
        largest = self._largest()
        return replace(prediction, largest=None if largest is None else max(largest, self.batch))

    def _largest(self) -> int | None:
        """The largest batch size in the worst case, 0 if there is none; None where one table draws no line."""
        from alignprop_fast.sampling import gate_count

        if len(self.tables) < 2:
            return None
        (small, one), (large, two) = sorted(self.tables.items())
        steps = range(self.num_steps - gate_count(self.truncation, self.num_steps)[0], self.num_steps)
        try:
            batch, _ = largest_batch(
                lambda batch: scaled(one, two, small, large, batch), self.num_steps, steps, self.budget_bytes
            )
        except BudgetInfeasible:
            return 0
        return batch


def from_table(options: Mapping[str, Any], given: Sequence[str]) -> Question:
    """The question about a saved table. given: names of the options that stand on the command line.

    Raises:
        ValueError: a bad table or budget, or an option that the table decides.
    """
    if idle := [name for name in given if name not in _BESIDE_TABLE]:
        raise ValueError(
            f"--{idle[0].replace('_', '-')} is settled by --table: leave it out, or estimate without --table"
        )
    wanted_bytes = _wanted_bytes(options)
    table = _with_host(load_table(Path(options["table"]).expanduser()), options)
    origin = table.origin
    device = origin.get("device", "an unknown device").partition(",")[0]
    try:
        budget_bytes, note = budget_on(device, find_gpu(device).memory_bytes, wanted_bytes)
    except ValueError as error:
        if "unknown GPU" not in str(error):
            raise
        if wanted_bytes is None:
            raise ValueError(f"how much memory {device} has is not known: give --memory-budget") from error
        budget_bytes, note = wanted_bytes, ""
    batch = int(origin.get("batch", 1))
    facts = {
        "model": origin.get("model"),
        "gpu": device,
        "source": origin.get("source"),
        "truncation": options["truncation"],
        "table": str(options["table"]),
    }
    return Question(
        tables={batch: table},
        batch=batch,
        num_steps=options["num_inference_steps"],
        truncation=options["truncation"],
        budget_bytes=budget_bytes,
        title=f"table {Path(options['table']).name}: {origin.get('model', 'a model')}, batch {batch}, {device}",
        note=note,
        facts=facts,
    )


def from_model(console: Console, options: Mapping[str, Any]) -> Question:
    """The question about a model, whose tables are estimated or measured now.

    Raises:
        ValueError, OSError: bad input, one line each.
    """
    from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory
    from alignprop_fast.sampling import gate_count

    _check_size(options)
    wanted_bytes, batch = _wanted_bytes(options), options["batch_size"]
    gate_count(options["truncation"], options["num_inference_steps"])
    gpu: Gpu | None = None
    if options["measure"]:
        if options["gpu"] is not None:
            raise ValueError("--measure measures the device that is here: leave out --gpu, or --measure")
        device = pick_device("auto")
        name, budget_bytes, note = budget_here(wanted_bytes, device)
        sampler = _measurable(options, device)
    else:
        gpu = _gpu(options["gpu"])
        name = gpu.name
        budget_bytes, note = budget_on(gpu.name, gpu.memory_bytes, wanted_bytes)
        sampler = _outline(options)
    tables: dict[int, CostTable] = {}
    for size in dict.fromkeys((batch, 2 if batch == 1 else 1)):
        how = "measuring" if gpu is None else "counting the operators of"
        with console.status(f"{how} a training step at batch size {size}; a large model takes a minute, once"):
            table = unless_out_of_memory(partial(sampler.cost_table, size, gpu, options["negative_prompt"] or None))
        if isinstance(table, OutOfMemory):
            if size == batch:
                raise ValueError(f"{table.reason} at batch size {batch}: use a smaller --batch-size or --resolution")
            break  # one table answers all but what the largest batch is
        tables[size] = _with_host(table, options)
    if (held_bytes := sampler.settled_budget(batch, options["negative_prompt"] or None)) is not None:
        budget_bytes, note = held_bytes, sampler.budget_note
    height, width = sampler.size
    facts = {
        "model": options["model"],
        "gpu": name,
        "source": "measured" if gpu is None else "estimated",
        "reward": options["reward"],
        "truncation": options["truncation"],
        "height": height,
        "width": width,
    }
    title = (
        f"{options['model']} at {width} x {height}, batch {batch}, {options['num_inference_steps']} steps, "
        f"reward {options['reward']}, on {name} ({facts['source']})"
    )
    steps, truncation = options["num_inference_steps"], options["truncation"]
    return Question(tables, batch, steps, truncation, budget_bytes, title, note, facts)


def _check_size(options: Mapping[str, Any]) -> None:
    if options["resolution"] is not None and (options["height"] or options["width"]):
        raise ValueError("--resolution stands for --height and --width: give the one or the others")


def _wanted_bytes(options: Mapping[str, Any]) -> int | None:
    """--memory-budget; None: auto."""
    budget = parse_budget(options["memory_budget"])
    if budget is None:
        raise ValueError("--memory-budget none is the leanest way, of which there is no plan: give a size, or auto")
    return None if budget == AUTO else int(budget)


def _with_host(table: CostTable, options: Mapping[str, Any]) -> CostTable:
    if options["host_memory"] is None:
        return table
    return replace(table, host_limit_bytes=parse_bytes(options["host_memory"], "host memory"))


def _gpu(name: str | None) -> Gpu:
    import torch

    if name is not None:
        return find_gpu(name)
    known = ", ".join(gpu.name for gpu in GPUS)
    if not torch.cuda.is_available():
        raise ValueError(f"there is no GPU here to plan for: name one by --gpu; known are {known}")
    here = torch.cuda.get_device_name()
    try:
        return find_gpu(here)
    except ValueError as error:
        raise ValueError(
            f"there is no data sheet of the GPU that is here, {here}: use --measure, or --gpu with one of {known}"
        ) from error


def _outline(options: Mapping[str, Any]) -> DifferentiableSampler:
    """The sampler on the meta device, with adapters."""
    import torch

    from alignprop_fast.models.architectures import NAMES, architecture
    from alignprop_fast.models.load.pipeline import load_outline, pick_scheduler
    from alignprop_fast.models.lora.adapters import add_lora

    model, precision = options["model"], options["mixed_precision"]
    rank, targets = options["lora_rank"], options["lora_targets"]
    dtype = torch.float32 if precision == "no" else torch.bfloat16  # fp16 takes as much and as long
    if model in NAMES:
        pipe = architecture(model, dtype, rank=rank, targets=targets).pipe
    else:
        try:
            pipe = load_outline(model, dtype)
        except FileNotFoundError as error:
            raise ValueError(f"{error}; of {', '.join(NAMES)} the name is enough") from error
        with torch.device("meta"):
            add_lora(pipe, rank, rank, targets)
    pipe.scheduler = pick_scheduler(pipe, options["scheduler"])
    if precision == "fp16" and pipe.vae.config.get("force_upcast", False):
        pipe.vae.to(torch.float32)
    _change_dtypes(pipe, options, "meta")
    return _sampler(pipe, _reward_outline(options, torch.float32 if precision in ("no", "fp16") else dtype), options)


def _reward_outline(options: Mapping[str, Any], dtype: Any) -> Any:
    """The reward on the meta device, tried once.

    Raises:
        ValueError: one that needs data.
    """
    import torch

    from alignprop_fast.demo import clip_path
    from alignprop_fast.rewards.architectures import architecture_reward
    from alignprop_fast.rewards.registry import parsed_spec

    models = list(options["reward_model"])
    parsed, given = parsed_spec(options["reward"], models)
    if options["model"] == "demo" and "clip" in dict(parsed) and "clip" not in given:
        models.append(f"clip={clip_path()}")
    reward = architecture_reward(options["reward"], dtype, models, allow_pickle=options["allow_pickle"])
    images_BCHW = torch.zeros(1, 3, 256, 256, device="meta", requires_grad=True)
    try:
        scores_B, _ = reward(images_BCHW, [""], [{}])
        torch.autograd.grad(scores_B.sum(), images_BCHW)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(
            f"the reward {options['reward']!r} does not run without data ({str(error).partition(chr(10))[0]}): "
            "use --measure, or plan with a reward of this package that is as large"
        ) from error
    return reward


def _measurable(options: Mapping[str, Any], device: str) -> DifferentiableSampler:
    """The sampler with its weights on the device, with adapters."""
    from alignprop_fast.cli.pipeline import open_pipeline, open_reward
    from alignprop_fast.models.architectures import NAMES
    from alignprop_fast.models.lora.adapters import add_lora
    from alignprop_fast.models.lora.targets import denoiser
    from alignprop_fast.training.options import TrainOptions

    if options["model"] in NAMES:
        raise ValueError(f"{options['model']} is an architecture without weights: give --measure a folder or a Hub id")
    names = ("model", "mixed_precision", "scheduler", "allow_pickle")
    pipe = open_pipeline(TrainOptions(**{name: options[name] for name in names}), device, place=False)
    add_lora(pipe, options["lora_rank"], options["lora_rank"], options["lora_targets"])
    _change_dtypes(pipe, options, device)
    # Last what may not have to lie there at all, as in training.
    placed = [denoiser(pipe), pipe.vae] if options["cache_text"] else [pipe]
    for part in placed:
        part.to(device)
    reward = open_reward(options["reward"], pipe, options["reward_model"], options["allow_pickle"])
    return _sampler(pipe, reward, options)


def _change_dtypes(pipe: Any, options: Mapping[str, Any], device: str) -> None:
    """The frozen linear layers and the adapters as --base-dtype and --adapter-dtype have them; packed on the device."""
    import torch

    from alignprop_fast.models.lean.quantization import quantize_linears
    from alignprop_fast.models.lora.targets import denoiser

    model = denoiser(pipe)
    if options["base_dtype"] != "auto":
        quantize_linears(model, options["base_dtype"], torch.device(device), model.dtype)
    for parameter in model.parameters():
        if parameter.requires_grad and options["adapter_dtype"] == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.grad_dtype = torch.float32  # as the trainer sums them


def _sampler(pipe: Any, reward: Any, options: Mapping[str, Any]) -> DifferentiableSampler:
    from alignprop_fast.generate.sampler import DifferentiableSampler
    from alignprop_fast.models.lora.targets import denoiser
    from alignprop_fast.planner.optimizer_state import merges, optimizer_bytes

    trained = [parameter for parameter in denoiser(pipe).parameters() if parameter.requires_grad]
    return DifferentiableSampler(
        pipe,
        options["num_inference_steps"],
        options["guidance_scale"],
        true_cfg_scale=options["true_cfg_scale"],
        memory_budget=options["memory_budget"] if pipe.device.type == "cuda" else None,
        host_memory=options["host_memory"],
        cache_text=options["cache_text"],
        compare_with_base=options["kl_weight"] > 0,
        height=options["height"] or options["resolution"],
        width=options["width"] or options["resolution"],
        reward=reward,
        reward_bytes=reward.weight_bytes(),
        optimizer_bytes=optimizer_bytes(options["optimizer"], [p.shape for p in trained], merges(options["optimizer"])),
    )
