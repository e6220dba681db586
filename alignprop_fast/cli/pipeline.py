"""Shared by the commands that draw pictures: pipeline, sampler, reward, progress by picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignprop_fast.cli.parts import sampling_of

if TYPE_CHECKING:
    from alignprop_fast.generate.sampler import DifferentiableSampler
    from alignprop_fast.rewards.mixture import WeightedSum
    from alignprop_fast.training.options import TrainOptions

START_ANEW = "start again with another --output-dir"  # a folder with some of the pictures is useless


def open_pipeline(options: TrainOptions, device: str, place: bool = True) -> Any:
    """The pipeline on the device, its weights in the options' precision ("auto": bf16 on a GPU, fp32 on the CPU).

    place: whether to move it to the device now.

    Raises:
        ValueError, OSError: fp16 is asked for on the CPU, or the model cannot be loaded.
    """
    import torch

    from alignprop_fast.models.load.pipeline import load_pipeline

    precision = options.mixed_precision
    if precision == "fp16" and device == "cpu":
        raise ValueError("--mixed-precision fp16 needs a GPU: use no or bf16")
    name = ("no" if device == "cpu" else "bf16") if precision == "auto" else precision
    return load_pipeline(
        options.model,
        {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name],
        device if place else "cpu",
        scheduler=options.scheduler,
        model_config=options.model_config,
        allow_pickle=options.allow_pickle,
    )


def open_sampler(options: TrainOptions, pipe: Any) -> DifferentiableSampler:
    """The sampler of the pipeline with these options.

    Raises:
        ValueError: as `DifferentiableSampler`.
    """
    from alignprop_fast.generate.sampler import DifferentiableSampler

    own = sampling_of(options)
    return DifferentiableSampler(
        pipe,
        own.num_inference_steps,
        own.guidance_scale,
        options.eta,
        true_cfg_scale=own.true_cfg_scale,
        cfg_normalization=options.cfg_normalization,
        cfg_truncation=options.cfg_truncation,
        height=options.height,
        width=options.width,
    )


def open_reward(reward: str, pipe: Any, reward_model: Sequence[str], allow_pickle: bool) -> WeightedSum:
    """The reward on the pipeline's device, in bf16 if the pipeline is (the range of fp16 is too small for scores).

    Raises:
        ValueError, OSError: the reward is unknown, or weights cannot be loaded.
    """
    import torch

    from alignprop_fast.models.lora.targets import denoiser
    from alignprop_fast.rewards import get_reward

    model = denoiser(pipe)
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
    return get_reward(reward, device=model.device, dtype=dtype, model=reward_model, allow_pickle=allow_pickle)


class PictureProgress:
    """Shows drawn pictures and time left: a bar, or ten plain lines without a terminal.

    The commands draw their first batch before they start it, to meet all errors before they write anything.
    """

    def __init__(self, console: Console, total: int):
        self._console, self._total, self._done, self._begin = console, total, 0, time.perf_counter()
        self._bar = Progress(
            TextColumn("drawing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("pictures"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> PictureProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        before, self._done = self._done, self._done + count
        self._bar.update(self._task, completed=self._done)
        if self._console.is_terminal or before * 10 // self._total == self._done * 10 // self._total:
            return
        # The first batch was drawn before the clock was started.
        seconds = (time.perf_counter() - self._begin) / before * (self._total - self._done) if before else None
        left = "" if seconds is None else f"  {seconds:.0f} s left"
        self._console.print(f"{self._done}/{self._total} pictures{left}")
