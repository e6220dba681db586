"""What accelerate takes from the environment, where `accelerate launch`, its configuration file or a shell put it.

Only this file reads these variables, before accelerate does. It compares them with the options:

    ACCELERATE_USE_FSDP, _DEEPSPEED, ...    refused: each process holds the whole model here
    ACCELERATE_DYNAMO_BACKEND               refused
    ACCELERATE_USE_CPU, _TORCH_DEVICE       followed where no device is chosen, else refused if another
    ACCELERATE_MIXED_PRECISION              followed where the option is "auto"; else the option holds
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS  the option holds

One line says what is followed and what an option overrides. Of accelerate's other variables, those of the processes and
their GPUs are followed. The rest concerns models and data loaders that accelerate prepares; it prepares none here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

ACCUMULATION, PRECISION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"
USE_CPU, TORCH_DEVICE = "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"
DYNAMO = "ACCELERATE_DYNAMO_BACKEND"

# Flags that make accelerate cut the model into pieces, or hand it to another engine.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (tensor, context or sequence parallelism)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
_OTHER_FLAGS = ("ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")  # harmless, if they are flags
_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")  # as accelerate reads them

# The number of processes and this one's index, in the order in which accelerate looks: as `accelerate launch` and
# torchrun set them, then as MPI does.
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
INDEX = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_PLACE = (
    *COUNT,
    *INDEX,
    *("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    *("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)

# Arguments of `Accelerator` that a user may give, and the fields of the config that hold others.
ACCELERATOR_ARGUMENTS = (
    *("cpu", "kwargs_handlers", "device_placement", "rng_types", "step_scheduler_with_optimizer"),
    *("split_batches", "dataloader_config", "project_dir"),
)
_FIELDS = {
    "mixed_precision": "mixed_precision",
    "gradient_accumulation_steps": "train_gradient_accumulation_steps",
    "gradient_accumulation_plugin": "train_gradient_accumulation_steps",
    "log_with": "log_with",
    "project_config": "project_kwargs",
    "dynamo_backend": "compiled",
    "dynamo_plugin": "compiled",
}


@dataclass(frozen=True)
class Launcher:
    """What the environment asks for; None where it says nothing.

    device: "cpu" or what ACCELERATE_TORCH_DEVICE names; device_variable says so. mixed_precision: "no", "fp16", "bf16".
    """

    device: str | None = None
    device_variable: str = ""
    mixed_precision: str | None = None
    gradient_accumulation_steps: int | None = None

    def choose_device(self, wanted: str) -> tuple[str, str]:
        """The device for an option, and a line to print where the environment chose it ("auto", or which "cuda").

        Raises:
            ValueError: it names another device than the option.
        """
        if self.device in (None, wanted):
            return wanted, ""
        if wanted != "auto" and not (wanted == "cuda" and self.device.startswith("cuda")):
            raise ValueError(
                f"{self.device_variable} asks for the device {self.device}, and the options for {wanted}: unset one"
            )
        return self.device, f"device {self.device}, as {self.device_variable} says"

    def choose_precision(self, wanted: str, default: str) -> tuple[str, str]:
        """The precision for an option, and a line to print; "auto" follows the environment, or is `default`.

        `accelerate launch` sets "no" where the user said nothing, so "no" means `default`.
        """
        asked = self.mixed_precision
        if wanted == "auto" and asked not in (None, "no"):
            return str(asked), f"mixed precision {asked}, as {PRECISION} says"
        chosen = default if wanted == "auto" else wanted
        if asked in (None, chosen, "no"):
            return chosen, ""
        return chosen, f"mixed precision {chosen}: the option holds, not {PRECISION}={asked}"

    def compare_accumulation(self, steps: int) -> str:
        """A line to print where the environment asks for another number of micro-batches; the option's number holds."""
        if self.gradient_accumulation_steps in (None, steps):
            return ""
        asked = self.gradient_accumulation_steps
        return f"gradient accumulation steps {steps}: the option holds, not {ACCUMULATION}={asked}"


def read_launcher(environment: Mapping[str, str] = os.environ) -> Launcher:
    """What the environment asks of accelerate.

    Raises:
        ValueError: a variable that cannot be followed here, or whose value means nothing; one line names it.
    """
    for name, engine in ENGINES.items():
        if _flag(environment, name):
            raise ValueError(
                f"accelerate is set up for {engine} ({name}={environment[name]}), and training here holds the whole "
                "model in each process: use accelerate launch --multi_gpu or torchrun, or unset the variable"
            )
    backend = environment.get(DYNAMO, "no")
    if backend.lower() != "no":
        raise ValueError(
            f"accelerate is set up for torch.compile ({DYNAMO}={backend}), which the chain does not support: set "
            "dynamo_backend to no, or unset the variable"
        )
    precision = environment.get(PRECISION, "").lower() or None
    if precision not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"{PRECISION}={environment[PRECISION]} cannot be followed: use no, bf16 or fp16, or unset it")
    steps = environment.get(ACCUMULATION) or None
    if steps is not None and not (steps.isascii() and steps.isdigit() and int(steps) > 0):
        raise ValueError(f"{ACCUMULATION}={steps} is no whole number of at least 1: unset it")
    for name in _OTHER_FLAGS:
        _flag(environment, name)
    device, variable = environment.get(TORCH_DEVICE) or None, TORCH_DEVICE
    if _flag(environment, USE_CPU):
        if device not in (None, "cpu"):
            raise ValueError(f"{USE_CPU} and {TORCH_DEVICE}={device} contradict each other: unset one")
        device, variable = "cpu", USE_CPU
    return Launcher(device, variable, precision, None if steps is None else int(steps))


def first_number(names: tuple[str, ...], default: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number in the first variable that is set; a negative one means unset, as an empty one does.

    Raises:
        ValueError: a variable that holds something else; one line names it.
    """
    for name in names:
        value = environment.get(name) or "-1"
        try:
            number = int(value)
        except ValueError:
            raise ValueError(f"{name}={value} is no whole number: a launcher sets it, else unset it") from None
        if number >= 0:
            return number
    return default


def drop_empty_places(environment: MutableMapping[str, str] = os.environ) -> None:
    """Unset empty variables of this process's place, which accelerate and torch would read as numbers.

    Raises:
        ValueError: as `first_number`.
    """
    for name in _PLACE:
        first_number((name,), -1, environment)
        if environment.get(name) == "":
            del environment[name]


def checked_arguments(arguments: Mapping[str, Any], accumulation_steps: int) -> dict[str, Any]:
    """The user's arguments for `Accelerator`, without those that change nothing.

    Raises:
        ValueError: one that the config has a field for, or that cannot be followed here.
    """
    asked = {name: value for name, value in arguments.items() if not _asks_nothing(name, value, accumulation_steps)}
    for name in asked:
        if name in _FIELDS:
            raise ValueError(f"accelerator_kwargs holds {name}: use the field {_FIELDS[name]} instead")
        if name not in ACCELERATOR_ARGUMENTS:
            raise ValueError(f"accelerator_kwargs holds {name}, which this trainer does not support: leave it out")
    return asked


def _asks_nothing(name: str, value: Any, accumulation_steps: int) -> bool:
    """Whether an argument has the value that holds without it."""
    if name == "gradient_accumulation_plugin" and value is not None:  # the rest of it concerns data loaders
        return bool(value.num_steps == accumulation_steps)
    if name in ("dynamo_backend", "dynamo_plugin"):
        return str(getattr(value, "backend", value)).lower() in ("none", "no")
    return value is None or (name == "cpu" and not value)


def _flag(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "false").lower()
    if value not in (*_TRUE, *_FALSE):
        raise ValueError(f"{name}={environment[name]} is neither true nor false: set it to one, or unset it")
    return value in _TRUE
