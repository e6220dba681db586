"""Training options: the 33 fields of trl 0.23.1's AlignPropConfig, with the same names and defaults, then our own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignprop_fast.planner import AUTO, parse_budget, parse_bytes
from alignprop_fast.planner.optimizer_state import OPTIMIZERS
from alignprop_fast.training.field_types import as_plain_types, check_types

_PRECISIONS = ("no", "none", "fp16", "bf16")
_TRACKERS = (None, "wandb", "tensorboard", "trackio")


@dataclass
class AlignPropConfig:
    """Options of `AlignPropTrainer`. One epoch is one optimizer step, as in trl.

    Fields of trl 0.23.1:
        exp_name: name of the experiment; the script's name without its extension.
        run_name: name of this run.
        seed: seed of the global random-number generators (plus the process index).
        log_with: "wandb", "tensorboard", "trackio" or None.
        log_image_freq: call the image hook every so many optimizer steps.
        tracker_kwargs: options of the tracker, passed to accelerate's `init_trackers`.
        accelerator_kwargs: options of `accelerate.Accelerator`, but for those that have a field here and for engines
            (FSDP, DeepSpeed, ...), which are refused. What accelerate takes from the environment: see `launcher`.
        project_kwargs: options of `accelerate.utils.ProjectConfiguration`; `project_dir` says where checkpoints go,
            `total_limit` how many are kept.
        tracker_project_name: name of the project in the tracker.
        logdir: folder of trackers and checkpoints where neither output_dir nor project_kwargs names one.
        num_epochs: optimizer steps in all.
        save_freq: epochs between checkpoints; one is always written at the end.
        num_checkpoint_limit: checkpoints kept, the oldest goes first.
        mixed_precision: "fp16" (GPU only), "bf16", or "no" (also "none"): fp32.
        allow_tf32: let matrix products of fp32 use TF32 on NVIDIA GPUs.
        resume_from: a checkpoint folder, or a folder of checkpoints, of which the newest is taken.
        sample_num_steps: denoising steps T.
        sample_eta: DDIM noise, 0 to 1.
        sample_guidance_scale: classifier-free guidance; 1 or less turns it off.
        train_batch_size: images per process and micro-batch.
        train_use_8bit_adam: the same as optimizer="adamw8bit".
        train_learning_rate, train_adam_beta1, train_adam_beta2, train_adam_weight_decay, train_adam_epsilon:
            the optimizer's.
        train_gradient_accumulation_steps: micro-batches per optimizer step.
        train_max_grad_norm: gradients are clipped to this norm.
        negative_prompts: one text, used as the negative prompt of every image.
        truncated_backprop_rand: draw anew for each denoising step whether it carries gradient.
        truncated_backprop_timestep: if not drawn: steps from this index on carry gradient.
        truncated_rand_backprop_minmax: if drawn: step i carries gradient iff i >= r, r uniform in this closed range.
        push_to_hub: for the user's script; the trainer itself never uploads unasked.

    Fields of our own:
        output_dir: folder of checkpoints (in `checkpoints/`) and model card; None: project_dir, else logdir.
        memory_budget: what live tensors may take on the device in all, in bytes or as "24GiB"; "auto": what is free on
            the GPU, and as None on the CPU; None or "none": the leanest way. See `DifferentiableSampler`.
        host_memory: what offloading may lock of this computer's memory, in bytes or as "16GiB", by all processes
            together; None: half of what is free.
        truncation: a rule of `sampling.gates` ("full", "last:K", "uniform", "lv:N", "drtune", "refl", ...) in place of
            the three truncated_* fields; None: those fields.
        kl_weight: adds kl_weight * base_mse to the loss: the mean squared difference of the (guided) model output to
            the base model's, over the gradient steps (see `DifferentiableSampler`); needs adapters. 0 turns it off.
        lora_rank, lora_alpha, lora_targets: of new adapters; targets: attention, attention+ff or all.
        base_dtype: how the large frozen linear layers are stored: "auto" (as mixed_precision says), "fp8", "int8" or
            "nf4" (bitsandbytes); they compute in the mixed precision's dtype all the same.
        adapter_dtype: "fp32", or "bf16" with stochastic rounding in the optimizer's step: half the bytes of adapters,
            and no casts in the chain. Gradients are fp32 all the same.
        optimizer: "adamw", "adamw8bit", "pagedadamw8bit", "lion8bit", "ademamix8bit" (bitsandbytes), "adafactor" or
            "prodigy" (prodigyopt); upper and lower case are the same. See `optim.make_optimizer`.
        optimizer_in_backward: full fine-tuning only: step each parameter in the backward pass as soon as its gradient
            is complete, and free it. `train_max_grad_norm` then clips each tensor's gradient by itself.
        cache_text: encode each prompt once; between encodings the text encoders lie on the CPU.
        max_bad_steps: stop after so many optimizer steps in a row with a loss or gradient that is not finite.
        height, width: pixels; None: the model's own size.
        guidance_rescale: phi of Lin et al. 2023; 0 turns it off.
        true_cfg_scale: FLUX: classifier-free guidance beside the distilled one, where there is a negative prompt; 1 or
            less turns it off.
        cuda_graphs, compiled: run evaluations without gradient as CUDA graphs, or their transformer blocks through
            torch.compile; need a GPU. See `DifferentiableSampler`.
        deterministic: the same bits from run to run on a GPU too, by `torch.use_deterministic_algorithms`; costs some
            speed. An operator that has no such form ends the run, and says so.

    Raises:
        ValueError: a value that cannot work; one line that says what to use.
    """

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    run_name: str | None = ""
    seed: int = 0
    log_with: str | None = None
    log_image_freq: int = 1
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = "trl"
    logdir: str = "logs"
    num_epochs: int = 100
    save_freq: int = 1
    num_checkpoint_limit: int = 5
    mixed_precision: str = "fp16"
    allow_tf32: bool = True
    resume_from: str | None = ""
    sample_num_steps: int = 50
    sample_eta: float = 1.0
    sample_guidance_scale: float = 5.0
    train_batch_size: int = 1
    train_use_8bit_adam: bool = False
    train_learning_rate: float = 1e-3
    train_adam_beta1: float = 0.9
    train_adam_beta2: float = 0.999
    train_adam_weight_decay: float = 1e-4
    train_adam_epsilon: float = 1e-8
    train_gradient_accumulation_steps: int = 1
    train_max_grad_norm: float = 1.0
    negative_prompts: str | None = None
    truncated_backprop_rand: bool = True
    truncated_backprop_timestep: int = 49
    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50)
    push_to_hub: bool = False

    output_dir: str | None = None
    memory_budget: int | str | None = AUTO
    host_memory: int | str | None = None
    truncation: str | None = None
    kl_weight: float = 0.0
    lora_rank: int = 4
    lora_alpha: float = 4
    base_dtype: str = "auto"
    adapter_dtype: str = "fp32"
    optimizer: str = "adamw"
    optimizer_in_backward: bool = False
    cache_text: bool = True
    max_bad_steps: int = 10
    height: int | None = None
    width: int | None = None
    guidance_rescale: float = 0.0
    lora_targets: str = "attention"
    true_cfg_scale: float = 1.0
    cuda_graphs: bool = False
    compiled: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.truncated_rand_backprop_minmax, list):  # YAML and JSON know no tuples
            self.truncated_rand_backprop_minmax = tuple(self.truncated_rand_backprop_minmax)
        as_plain_types(self, ("output_dir", "logdir", "resume_from"))
        check_types(self, ("memory_budget", "host_memory"))
        if self.train_use_8bit_adam:
            self.optimizer = "adamw8bit"
        self.optimizer = self.optimizer.lower()
        self._check_counts()
        self._check_optimizer()
        self._check_choices()
        self._check_truncation()
        parse_budget(self.memory_budget)
        if self.host_memory is not None:
            parse_bytes(self.host_memory, "host memory")

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

    def _check_counts(self) -> None:
        at_least_one = (
            *("num_epochs", "save_freq", "log_image_freq", "num_checkpoint_limit", "sample_num_steps"),
            *("train_batch_size", "train_gradient_accumulation_steps", "lora_rank", "max_bad_steps"),
        )
        for name in at_least_one:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value!r}: use a whole number of at least 1")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and value < 8:
                raise ValueError(f"{name} is {value} pixels: use a multiple of 8 of at least 8, or leave it out")

    def _check_optimizer(self) -> None:
        for name in ("train_learning_rate", "train_adam_epsilon", "train_max_grad_norm", "lora_alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: use a number above 0")
        for name in ("train_adam_beta1", "train_adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use a number of at least 0 and below 1")
        if self.train_adam_weight_decay < 0:
            raise ValueError(f"train_adam_weight_decay is {self.train_adam_weight_decay}: use 0 or more")
        if self.optimizer_in_backward and self.optimizer == "prodigy":
            raise ValueError("prodigy needs all gradients at once: use another optimizer with optimizer_in_backward")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}: use {', '.join(OPTIMIZERS)}")

    def _check_choices(self) -> None:
        if self.mixed_precision not in _PRECISIONS:
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}: use no, bf16 or fp16")
        if self.base_dtype not in ("auto", "fp8", "int8", "nf4"):
            raise ValueError(f"base_dtype is {self.base_dtype!r}: use auto, fp8, int8 or nf4")
        if self.adapter_dtype not in ("fp32", "bf16"):
            raise ValueError(f"adapter_dtype is {self.adapter_dtype!r}: use fp32 or bf16")
        if self.adapter_dtype == "bf16" and self.mixed_precision == "fp16":
            raise ValueError('adapter_dtype="bf16" does not go with mixed_precision="fp16": use bf16 for both')
        if self.log_with not in _TRACKERS:
            raise ValueError(f"log_with is {self.log_with!r}: use wandb, tensorboard, trackio or nothing")
        if not 0 <= self.sample_eta <= 1:
            raise ValueError(f"sample_eta is {self.sample_eta}: use 0 (no noise) to 1 (DDPM's noise)")
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight is {self.kl_weight}: use 0 (off) or more")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.guidance_rescale}: use 0 (off) to 1")

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


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat
