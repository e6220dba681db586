"""Training options: the 33 fields of trl 0.23.1's AlignPropConfig, with the same names and defaults, then our own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignprop_fast.planner import parse_budget, parse_bytes
from alignprop_fast.training.declaration import Declaration, declared, like, option
from alignprop_fast.training.field_types import as_plain_types, check_types
from alignprop_fast.training.options import TrainOptions
from alignprop_fast.training.trainer_options import TrainerOptions


@dataclass
class TrlFields:
    """The fields of trl 0.23.1's AlignPropConfig. Bounds stand here where the command line has no such option."""

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    run_name: str | None = ""
    seed: int = 0
    log_with: str | None = None
    log_image_freq: int = option(1, at_least=1)
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = "trl"
    logdir: str = "logs"
    num_epochs: int = 100
    save_freq: int = 1
    num_checkpoint_limit: int = option(5, at_least=1)
    mixed_precision: str = option("fp16", choices=("no", "none", "fp16", "bf16"))
    allow_tf32: bool = True
    resume_from: str | None = ""
    sample_num_steps: int = 50
    sample_eta: float = 1.0
    sample_guidance_scale: float = 5.0
    train_batch_size: int = 1
    train_use_8bit_adam: bool = False
    train_learning_rate: float = 1e-3
    train_adam_beta1: float = option(0.9, at_least=0, below=1)
    train_adam_beta2: float = option(0.999, at_least=0, below=1)
    train_adam_weight_decay: float = option(1e-4, at_least=0)
    train_adam_epsilon: float = option(1e-8, above=0)
    train_gradient_accumulation_steps: int = 1
    train_max_grad_norm: float = 1.0
    negative_prompts: str | None = None
    truncated_backprop_rand: bool = True
    truncated_backprop_timestep: int = 49
    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50)
    push_to_hub: bool = False


@dataclass
class AlignPropConfig(TrainerOptions, TrlFields):
    """Options of `AlignPropTrainer`. One epoch is one optimizer step, as in trl.

    Fields of trl 0.23.1:
        exp_name: name of the experiment; the script's name without its extension.
        run_name: name of this run.
        seed: seed of the global random-number generators (plus the process index).
        log_with: "wandb", "tensorboard", "trackio" or None.
        log_image_freq: call the image hook every so many optimizer steps.
        tracker_kwargs: options of the tracker, passed to accelerate's `init_trackers`.
        accelerator_kwargs: options of `accelerate.Accelerator`. Options that have a field here, and engines (FSDP,
            DeepSpeed, ...), are refused. `launcher` says what accelerate takes from the environment.
        project_kwargs: options of `accelerate.utils.ProjectConfiguration`; `project_dir` says where checkpoints go,
            `total_limit` how many are kept.
        tracker_project_name: name of the project in the tracker.
        logdir: folder of trackers and checkpoints if neither output_dir nor project_kwargs names one.
        num_epochs: optimizer steps in total.
        save_freq: epochs between checkpoints; one is always written at the end.
        num_checkpoint_limit: checkpoints kept, the oldest goes first.
        mixed_precision: "fp16" (GPU only), "bf16", or "no" (also "none"): fp32.
        allow_tf32: let matrix products of fp32 use TF32 on NVIDIA GPUs.
        resume_from: a checkpoint folder, or a folder of checkpoints, whose newest is used.
        sample_num_steps: denoising steps T.
        sample_eta: DDIM noise, 0 to 1.
        sample_guidance_scale: classifier-free guidance; 1 or less turns it off.
        train_batch_size: images per process and micro-batch.
        train_use_8bit_adam: the same as optimizer="adamw8bit".
        train_learning_rate, train_adam_beta1, train_adam_beta2, train_adam_weight_decay, train_adam_epsilon:
            of the optimizer.
        train_gradient_accumulation_steps: micro-batches per optimizer step.
        train_max_grad_norm: gradients are clipped to this norm; infinity turns clipping off.
        negative_prompts: one text, used as the negative prompt of every image.
        truncated_backprop_rand: draw for each denoising step whether it carries gradient.
        truncated_backprop_timestep: if not drawn, steps from this index on carry gradient.
        truncated_rand_backprop_minmax: if drawn, step i carries gradient iff i >= r, r uniform in this closed range.
        push_to_hub: for the user's script; the trainer itself never uploads unasked.

    Our own fields are declared in `training.trainer_options.TrainerOptions`; `help` lists them. Only in Python:
        output_dir: folder of checkpoints (in `checkpoints/`) and model card; None: project_dir, else logdir.
        memory_budget, host_memory: also a number of bytes; a budget of None is "none". The config holds them in
            bytes. See `DifferentiableSampler`.
        truncation: None: the three truncated_* fields.
        lora_alpha: 4, for every rank.
        optimizer: upper and lower case are the same.

    Raises:
        ValueError: a value cannot work; the message is one line with the remedy.
    """

    lora_alpha: float = like(TrainerOptions, "lora_alpha", 4)

    def __post_init__(self) -> None:
        if isinstance(self.truncated_rand_backprop_minmax, list):  # YAML and JSON know no tuples
            self.truncated_rand_backprop_minmax = tuple(self.truncated_rand_backprop_minmax)
        as_plain_types(self, ("output_dir", "logdir", "resume_from"))
        check_types(self, ("memory_budget", "host_memory"))
        if self.train_use_8bit_adam:
            self.optimizer = "adamw8bit"
        self.optimizer = self.optimizer.lower()
        for name, declaration in _declarations().items():
            declaration.check(name, getattr(self, name))
        self._check_pairs()
        self._check_truncation()
        self.memory_budget = parse_budget(self.memory_budget)
        if self.host_memory is not None:
            self.host_memory = parse_bytes(self.host_memory, "host_memory", or_zero=True)

    def to_dict(self) -> dict[str, Any]:
        """All fields, flat: a nested dictionary becomes "field/key" entries, as in trl."""
        return _flatten(asdict(self))

    def check_packages(self) -> None:
        """To be asked before training: a plan needs none of these packages.

        Raises:
            ValueError: what the options need is not installed.
        """
        package = {"prodigy": "prodigyopt"}.get(self.optimizer, "bitsandbytes" if "8bit" in self.optimizer else None)
        if package is not None and find_spec(package) is None:
            raise ValueError(f'{self.optimizer} needs {package}: pip install {package}, or use optimizer="adamw"')
        if self.base_dtype == "nf4" and find_spec("bitsandbytes") is None:
            raise ValueError('base_dtype="nf4" needs bitsandbytes: pip install bitsandbytes, or use fp8 or int8')

    def _check_pairs(self) -> None:
        if self.optimizer_in_backward and self.optimizer == "prodigy":
            raise ValueError("prodigy needs all gradients at once: use another optimizer with optimizer_in_backward")
        if self.adapter_dtype == "bf16" and self.mixed_precision == "fp16":
            raise ValueError('adapter_dtype="bf16" does not support mixed_precision="fp16": use bf16 for both')
        if self.warmup_steps >= self.num_epochs:
            raise ValueError(f"warmup_steps is {self.warmup_steps}: use fewer than num_epochs={self.num_epochs}")

    def _check_truncation(self) -> None:
        """A setting under which no denoising step could ever carry gradient must not start to train."""
        last = self.sample_num_steps - 1
        if self.truncation is not None:
            return  # draw_truncation knows its rules and names them
        if not self.truncated_backprop_rand:
            if self.truncated_backprop_timestep > last:
                raise ValueError(
                    f"truncated_backprop_timestep={self.truncated_backprop_timestep} lies beyond the last step {last}, "
                    f"so nothing would learn: use at most {last}"
                )
            return
        minmax = self.truncated_rand_backprop_minmax
        if len(minmax) != 2 or minmax[0] > minmax[1]:
            raise ValueError(f"truncated_rand_backprop_minmax is {minmax}: use (smallest, largest)")
        if minmax[0] > last:
            raise ValueError(
                f"truncated_rand_backprop_minmax={tuple(minmax)} begins beyond the last step {last}, "
                f"so nothing would learn: use a smallest value of at most {last}"
            )


_OURS = [f"        {each.name}: {option.help}" for each, option in declared(TrainerOptions)]
AlignPropConfig.__doc__ = f"{AlignPropConfig.__doc__}\n    Fields of our own:\n" + "\n".join(_OURS)


def config_field(name: str, declaration: Declaration) -> str:
    """The field of `AlignPropConfig` that an option of the command line sets, "" if there is none."""
    return declaration.field or (name if name in AlignPropConfig.__dataclass_fields__ else "")


def _declarations() -> dict[str, Declaration]:
    """By field of `AlignPropConfig`: as the command line has them, but for those that this file declares."""
    by_field = {config_field(each.name, declaration): declaration for each, declaration in declared(TrainOptions)}
    own = {each.name: declaration for each, declaration in declared(AlignPropConfig)}
    return {name: declaration for name, declaration in (by_field | own).items() if name}


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat
