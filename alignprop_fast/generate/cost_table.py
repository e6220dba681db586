"""The planner's cost table of a training step, measured on the device or counted for any GPU.

Measured tables are kept in the user's cache folder. The file name is a hash of everything that their numbers depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignprop_fast.files import cache_folder
from alignprop_fast.generate.denoising import DenoisingChain
from alignprop_fast.planner import (
    GRADES,
    CostTable,
    CountedTable,
    Gpu,
    Option,
    Segment,
    Stage,
    load_table,
    roofline_seconds,
    save_table,
)
from alignprop_fast.rewards.reward import Reward
from alignprop_fast.runtime import (
    DECODER_STAGES,
    Block,
    DecoderCosts,
    Told,
    allocated_bytes,
    autocast_dtype,
    device_name,
    link_rate,
    nobody,
    rated_dtype,
    remembered_results,
    reward_stages,
    step_costs,
    transfer_bytes,
    within,
)
from alignprop_fast.version import __version__

# cuBLAS and cuDNN workspaces and the allocator's rounding, assumed if there is no device to measure them.
_ESTIMATED_WORKSPACE_BYTES = 160 * 2**20


# What decoders cost, by all that this depends on except the batch size.
Decoders = dict[Hashable, DecoderCosts]


@dataclass(frozen=True)
class TrainingStep:
    """The parts of one training step.

    model: the adapter (`models`) of the pipeline, on its device or on meta tensors. size: (height, width) in pixels.
    prompts, metadata: input of the reward, one entry per image.
    reward: scores the images, or None. reward_bytes: of its weights.
    reserve_bytes: memory to reserve for the reward phase if `reward` is None.
    optimizer_bytes: of the optimizer's state; None: two fp32 numbers per trainable parameter.
    one_image: what decoding one image costs, as far as it is known already.
    resident: the model's modules that are on the device while the chain runs.
    keeps_gradients: whether gradients of earlier backward passes are kept while the chain runs.
    host_limit_bytes: the most host memory that offloading may take.
    """

    model: Any
    chain: DenoisingChain
    cond: Any
    size: tuple[int, int]
    decoder_blocks: Sequence[Block]
    one_image: Sequence[Stage]
    resident: Sequence[nn.Module]
    prompts: Sequence[str]
    metadata: Sequence[Any]
    reward: Reward | None = None
    reward_bytes: int = 0
    reserve_bytes: int = 0
    optimizer_bytes: int | None = None
    keeps_gradients: bool = True
    host_limit_bytes: int = 0

    @property
    def batch(self) -> int:
        return len(self.prompts)


def measured_table(step: TrainingStep, decoders: Decoders, told: Told = nobody) -> CostTable:
    """Run each part of the step on its device under each option, or read earlier measurements.

    Call it under the step's own autocast state, because costs depend on it. The reward is measured each time, because
    it may be any callable.
    """
    device = step.model.device
    link = link_rate(device)
    origin = {**step_origin(step), "source": "measured", "device": device_name(device)}
    if link is None:  # a table without offloading must not be used once the driver locks memory
        origin["offload"] = "none"
    table = _remembered(origin, lambda: _costs(step, origin, link is not None, decoders, told))
    rewards = () if step.reward is None else _scoring(step.reward, _images(step), step.prompts, step.metadata)
    completed = _completed(table, step, rewards)
    return completed if link is None else completed.with_copies(link)


def roofline_on(gpu: Gpu, flop: float, size_bytes: int, dtype: torch.dtype) -> float:
    """Estimated seconds of an operator on tensors of this dtype on the GPU."""
    return roofline_seconds(flop, size_bytes, gpu, rated_dtype(dtype))


@remembered_results()
def counted_table(step: TrainingStep, gpu: Gpu, decoders: Decoders, told: Told = nobody) -> CountedTable:
    """The costs of a step on meta tensors, whose operators are counted. Any host memory is allowed.

    gpu: decides which products are rounded, if any are. Nothing else depends on it.

    Raises:
        ValueError: the reward needs data.
    """
    if step.chain.precision is not None:
        step.chain.precision.decide_by(partial(roofline_on, gpu))
    rewards = () if step.reward is None else counted_scoring(step.reward, _images(step), step.prompts, step.metadata)
    # Counts of one version are equal wherever they are made.
    versions = {"alignprop_fast": __version__, "torch": torch.__version__.partition("+")[0]}
    origin = {**step_origin(step), **versions, "source": "estimated"}
    table = _costs(step, origin, True, decoders, told)
    fixed = {"workspace": _ESTIMATED_WORKSPACE_BYTES}
    completed = _completed(replace(table, fixed=fixed), step, rewards)
    return CountedTable(replace(completed, host_limit_bytes=None))


@remembered_results()
def counted_scoring(
    reward: Reward, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
) -> tuple[Stage, ...]:
    """The costs of scoring images [B, 3, H, W] on the meta device.

    Raises:
        ValueError: the reward needs data.
    """
    try:
        return _scoring(reward, images, prompts, metadata)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(
            f"the reward does not run without data ({str(error).partition(chr(10))[0]}): "
            "use --measure, or plan with a reward of this package of the same size"
        ) from error


def _remembered(origin: Mapping[str, str], costs: Callable[[], CostTable]) -> CostTable:
    """The remembered table of exactly this origin, or else costs(), which is then remembered."""
    path = cache_file(origin)
    table = _read(path)
    if table is None:
        table = costs()
        if not _complete(table):  # memory was short; the next process may have more
            return table
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_table(table, path)
        except OSError:
            pass  # the next process computes it again
    return table


def _complete(table: CostTable) -> bool:
    """Whether every option of a step and every stage of the decoder could be measured."""
    options = {option.name for segment in table.step for option in segment.options}
    return options >= {*GRADES} and {stage.name for stage in table.decoders} >= {*DECODER_STAGES}


def _read(path: Path) -> CostTable | None:
    """The remembered table, or None if there is none, if it is damaged, or if another version wrote it."""
    try:
        return load_table(path) if path.is_file() else None
    except ValueError:
        return None


def _costs(
    step: TrainingStep,
    origin: Mapping[str, str],
    offload: bool,
    decoders: Decoders,
    told: Told,
) -> CostTable:
    """The table without the parts that `_completed` adds."""
    x, model = latents(step), step.model
    image_bytes = _bytes([_images(step)])
    key = model.decode, *(item for item in origin.items() if item[0] != "batch")
    if key not in decoders:
        decoders[key] = DecoderCosts(model.decode, model.decode_by_bands, step.decoder_blocks, step.one_image)
    costs = step_costs(step.chain, x, offload, within(told, 0, 0.7))
    return CostTable(
        fixed={"workspace": costs.workspace_bytes},
        latent_bytes=_bytes([step.chain.start(x)]),
        image_bytes=image_bytes,
        step=costs.segments,
        transfer_bytes=transfer_bytes(costs.segments),
        sampling_bytes=costs.sampling_bytes,
        sampling_seconds=costs.sampling_seconds,
        closed_bytes=costs.closed_bytes,
        closed_seconds=costs.closed_seconds,
        decoders=decoders[key].stages(x, image_bytes),
        origin=origin,
    )


def _completed(table: CostTable, step: TrainingStep, rewards: tuple[Stage, ...]) -> CostTable:
    if step.chain.has_penalty:
        table = _penalised(table, step)
    # A sink adds to the existing gradients. Without one, sums are made beside them, in fp32.
    added = step.chain.gradient_sink is not None and step.keeps_gradients
    sums_bytes = 0 if added else _bytes(step.chain.receivers, narrowest=4)
    second = {} if step.chain.precision is None else {"second weights": step.chain.precision.size_bytes}
    return replace(
        table,
        sums_bytes=sums_bytes,
        fixed={**_fixed(step), **table.fixed, **second},
        rewards=rewards,
        reserve_bytes=step.reserve_bytes,
        host_limit_bytes=step.host_limit_bytes,
    )


def _penalised(table: CostTable, step: TrainingStep) -> CostTable:
    """The table with a `Chain.penalty`.

    Every gradient step has one more evaluation without gradient, whose result is kept for the backward pass, and the
    backward pass runs the step once more.
    """
    y_bytes = step.cond.branches * table.latent_bytes

    def twice(option: Option) -> Option:
        return replace(option, seconds=option.seconds * 2)

    def last(option: Option) -> Option:
        transient_bytes = max(option.transient_bytes, table.sampling_bytes + 3 * y_bytes)
        return replace(option, transient_bytes=transient_bytes, seconds=option.seconds * 2 + table.sampling_seconds)

    *blocks, rest = table.step
    doubled = [Segment(block.name, tuple(map(twice, block.options))) for block in blocks]
    return replace(
        table,
        step=(*doubled, Segment(rest.name, tuple(map(last, rest.options)))),
        latent_bytes=table.latent_bytes + y_bytes,
    )


def _scoring(
    reward: Reward, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
) -> tuple[Stage, ...]:
    # A reward may draw random numbers; measuring it must not change those of training.
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return reward_stages(reward, images, prompts, metadata, by_image=reward.by_image)


def latents(step: TrainingStep) -> torch.Tensor:
    model = step.model
    x = torch.zeros(step.batch, *model.latent_shape(step.size), device=model.device)
    return x.to(torch.promote_types(model.dtype, torch.float32))


def _images(step: TrainingStep) -> torch.Tensor:
    dtype = torch.promote_types(step.model.dtype, torch.float32)
    return torch.zeros(step.batch, 3, *step.size, device=step.model.device, dtype=dtype)


def _fixed(step: TrainingStep) -> dict[str, int]:
    """Bytes that are taken during the whole training step under every plan."""
    trained = step.chain.parameters
    device = step.model.device
    numbers = sum(parameter.numel() for parameter in trained)
    adapters_bytes = _bytes(trained)
    copies_bytes = 0 if step.chain.copies is None else allocated_bytes(step.chain.copies.size_bytes, device)
    tensors = [t for module in step.resident for t in (*module.parameters(), *module.buffers())]
    tensors = [t for t in tensors if t.device.type == device.type]
    conditioning = [t for t in vars(step.cond).values() if isinstance(t, torch.Tensor)]
    return {
        "weights": _bytes(tensors) - adapters_bytes,
        "adapters": adapters_bytes + copies_bytes,
        # Gradients are in fp32 also if adapters are in bf16 (see `FlatParameters`).
        "gradients": _bytes(trained, narrowest=4) if step.keeps_gradients else 0,
        "optimizer": 8 * numbers if step.optimizer_bytes is None else step.optimizer_bytes,
        "reward": step.reward_bytes,
        "conditioning": _bytes([*conditioning, *step.chain.texts.tensors()]),
    }


def _bytes(tensors: Sequence[torch.Tensor], narrowest: int = 1) -> int:
    """Bytes of the tensors, each counted once. narrowest: the least bytes per element to count."""
    distinct = {id(t): t for t in tensors}.values()
    return sum(allocated_bytes(t.numel() * max(narrowest, t.element_size()), t.device) for t in distinct)


def step_origin(step: TrainingStep) -> dict[str, str]:
    """Everything except the device that the numbers of a table depend on."""
    model = step.model
    trained = [(tuple(p.shape), str(p.dtype)) for p in (*step.chain.parameters, *step.chain.conditions)]
    # Quantised weights are buffers.
    named = (item for m in model.modules() for item in (*m.named_parameters(), *m.named_buffers()))
    weights = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]
    return {
        "model": type(model.pipe).__name__,
        # No weight shows the number of attention heads.
        "config": _hash([item for item in sorted(model.denoiser.config.items()) if not item[0].startswith("_")]),
        "scheduler": model.scheduler_name,
        "weights": _hash(weights),
        "trained": f"{len(trained)} tensors, {_hash(trained)}",
        "batch": str(step.batch),
        "height": str(step.size[0]),
        "width": str(step.size[1]),
        "branches": str(step.cond.branches),
        "guidance": "in the network" if step.chain.updates.combines else "in the update",
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "sampling_precision": "exact" if step.chain.precision is None else step.chain.precision.name,
        "mode": "training" if model.denoiser.training else "evaluation",  # dropout keeps its result, also at rate 0
        "autocast": str(autocast_dtype(model.device)),
        "gradients": "all at once" if step.chain.gradient_sink is None else "one by one",
        "alignprop_fast": f"{__version__}, code {_code()}",
        "torch": torch.__version__,
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


@cache
def _code() -> str:
    """A hash of the package's code that runs or measures a step, because code may change within a version."""
    package = Path(__file__).parents[1]
    parts = ("generate", "models", "ops", "runtime")
    return _hash([file.read_bytes() for part in parts for file in sorted((package / part).rglob("*.py"))])


def cache_file(origin: Mapping[str, str]) -> Path:
    return cache_folder() / "tables" / f"{_hash(json.dumps(origin, sort_keys=True))}.json"
