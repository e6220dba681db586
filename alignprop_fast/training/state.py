"""A trainer's state to and from checkpoints: all that makes a resumed run equal to an uninterrupted one."""

from __future__ import annotations

import json
import logging
import pickle
import platform
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import set_seed

from alignprop_fast.evaluation.early_stopping import Stateful
from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    new_checkpoint,
    read_checkpoint,
    rng_state,
    save_tensors,
    set_rng_state,
)
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.placement import checkpoint_root
from alignprop_fast.training.processes import of_all_processes, wait_for_all
from alignprop_fast.training.weight_update import WeightUpdate

logger = logging.getLogger(__name__)

_COUNTERS = ("steps_done", "global_step", "skipped_steps")
_PACKAGES = ("alignprop_fast", "torch", "diffusers", "transformers", "peft", "accelerate")


class Resumable(Protocol):
    """What a checkpoint reads of a trainer and puts back into it."""

    config: AlignPropConfig
    accelerator: Any  # accelerate.Accelerator, or one of its interface
    sd_pipeline: DefaultDDPOStableDiffusionPipeline
    update: WeightUpdate
    stateful: dict[str, Stateful]  # by their names in the checkpoint
    steps_done: int
    global_step: int
    skipped_steps: int
    first_epoch: int


def find_resume(config: AlignPropConfig) -> Path | None:
    """The checkpoint that `resume_from` means, checked; None for a fresh run.

    Raises:
        FileNotFoundError: nothing to resume from.
        ValueError: a damaged checkpoint, or a fresh run into a folder that holds checkpoints already.
    """
    if config.resume_from:
        folder = find_checkpoint(config.resume_from)
        read_checkpoint(folder)
        return folder
    root = checkpoint_root(config)
    if checkpoints(root):
        raise ValueError(
            f"{root} holds checkpoints of an earlier run: set resume_from={str(root)!r}, or choose another output_dir"
        )
    return None


def save_training(trainer: Resumable) -> Path:
    """Write `checkpoint_<steps done>`. Every process takes part; the main one writes, the others wait for it."""
    rng_states = of_all_processes(rng_state())
    root, config = checkpoint_root(trainer.config), trainer.config
    if trainer.accelerator.is_main_process:
        state = {name: getattr(trainer, name) for name in _COUNTERS}
        keep = config.project_kwargs.get("total_limit") or config.num_checkpoint_limit
        with new_checkpoint(root, trainer.steps_done, {**state, "versions": package_versions()}, keep) as folder:
            trainer.sd_pipeline.save_checkpoint([trainer.sd_pipeline.unet], [], folder)
            save_tensors(trainer.update.state_dict(), folder / "optimizer.pt")
            save_tensors(rng_states, folder / "rng.pt")
            save_tensors({name: owner.state_dict() for name, owner in trainer.stateful.items()}, folder / "stateful.pt")
            # What the dictionaries for accelerate and trackers hold may be any object.
            (folder / "config.json").write_text(json.dumps(asdict(config), indent=1, default=str), encoding="utf-8")
    wait_for_all()
    return root / f"checkpoint_{trainer.steps_done}"


def restore_training(trainer: Resumable, folder: Path) -> None:
    """Put weights, optimizer, random-number states and counters back, in place. Random states last of all.

    With another number of processes the run goes on with new random numbers, since each draws other images.

    Raises:
        ValueError: the checkpoint was made with another rank, optimizer or kind of device.
    """
    state = read_checkpoint(folder)
    _check_same(trainer.config, json.loads((folder / "config.json").read_text(encoding="utf-8")), folder)
    try:
        update = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        rng_states = torch.load(folder / "rng.pt", map_location="cpu", weights_only=True)
        owned = torch.load(folder / "stateful.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"checkpoint {folder} cannot be read by this torch: resume with the one that wrote it"
        ) from error
    trainer.sd_pipeline.load_checkpoint([trainer.sd_pipeline.unet], folder)
    trainer.update.load_state_dict(update)
    for name, owner in trainer.stateful.items():
        if name in owned:  # what is new in this run begins anew
            owner.load_state_dict(owned[name])
    for name in _COUNTERS:
        setattr(trainer, name, state[name])
    trainer.first_epoch = trainer.steps_done
    processes = trainer.accelerator.num_processes
    if len(rng_states) == processes:
        set_rng_state(rng_states[trainer.accelerator.process_index])
    else:
        # Random numbers that no process has had: the step is in the seed, and set_seed adds the process's index.
        set_seed((trainer.config.seed + 1000003 * trainer.steps_done) % 2**32, device_specific=True)
        logger.warning(
            "the checkpoint was made by %d processes and %d go on: with new random numbers", len(rng_states), processes
        )
    logger.info("resumed from %s after %d steps", folder, trainer.steps_done)


def _check_same(config: AlignPropConfig, saved: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if an option differs that decides the shapes of saved tensors. Others may change between runs.

    A checkpoint that lacks an option is older than the option, and was made with its default.
    """
    saved = {**asdict(AlignPropConfig()), **saved}
    for name in ("optimizer", "optimizer_in_backward", "adapter_dtype", "lora_rank", "lora_alpha"):
        if getattr(config, name) != saved[name]:
            raise ValueError(f"checkpoint {folder} was made with {name}={saved[name]}: resume with the same")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    # Not the installed distributions': a package may lie on the path without one.
    return {
        "python": platform.python_version(),
        **{name.replace("_", "-"): import_module(name).__version__ for name in _PACKAGES},
    }
