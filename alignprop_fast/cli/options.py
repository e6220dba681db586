"""Options of the command line: names, meaning, defaults, and how YAML file and command line combine."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from alignprop_fast.cli.folder import TRACKER
from alignprop_fast.cli.yaml_file import read_yaml

if TYPE_CHECKING:
    from alignprop_fast.training.config import AlignPropConfig


class Precision(StrEnum):
    auto = "auto"
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class BaseDtype(StrEnum):
    auto = "auto"
    fp8 = "fp8"
    int8 = "int8"
    nf4 = "nf4"


class AdapterDtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class OptimizerName(StrEnum):
    adamw = "adamw"
    adamw8bit = "adamw8bit"
    pagedadamw8bit = "pagedadamw8bit"
    lion8bit = "lion8bit"
    ademamix8bit = "ademamix8bit"
    adafactor = "adafactor"
    prodigy = "prodigy"


class SchedulerName(StrEnum):
    auto = "auto"
    ddim = "ddim"
    euler = "euler"
    euler_ancestral = "euler-ancestral"
    dpm_solver = "dpm++2m"
    flow_euler = "flow-euler"


class LoraTargets(StrEnum):
    attention = "attention"
    feed_forward = "attention+ff"
    all = "all"


class Tracker(StrEnum):
    wandb = "wandb"
    tensorboard = "tensorboard"
    trackio = "trackio"


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`, by their names on the command line (and in YAML), with their defaults."""

    output_dir: str = "alignprop-output"
    model: str = "demo"
    model_config: str | None = None
    reward: str = "clip"
    reward_model: tuple[str, ...] = ()
    allow_pickle: bool = False
    normalise_rewards: bool = False
    prompts: str = "demo"
    steps: int = 100
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    true_cfg_scale: float = 1.0
    scheduler: str = "auto"
    eta: float = 1.0
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lora_rank: int = 4
    lora_alpha: float | None = None
    lora_targets: str = "attention"
    base_dtype: str = "auto"
    adapter_dtype: str = "fp32"
    optimizer: str = "adamw"
    cache_text: bool = True
    mixed_precision: str = "auto"
    memory_budget: str = "auto"
    host_memory: str | None = None
    truncation: str = "uniform"
    kl_weight: float = 0.0
    watch_reward: str | None = None
    watch_reward_model: tuple[str, ...] = ()
    watch_prompts: str | None = None
    watch_pictures: int = 16
    diversity_model: str | None = None
    patience: int | None = None
    max_drop: float = 0.0
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    save_every: int = 10
    sample_every: int = 10
    log_with: str | None = None
    device: str = "auto"
    deterministic: bool = False


DEFAULTS = TrainOptions()

# Options whose field in AlignPropConfig, which keeps trl's names, is called otherwise.
_FIELDS = {
    "steps": "num_epochs",
    "num_inference_steps": "sample_num_steps",
    "guidance_scale": "sample_guidance_scale",
    "eta": "sample_eta",
    "batch_size": "train_batch_size",
    "gradient_accumulation_steps": "train_gradient_accumulation_steps",
    "learning_rate": "train_learning_rate",
    "save_every": "save_freq",
    "negative_prompt": "negative_prompts",
}
_SAME_NAME = (
    *("lora_rank", "base_dtype", "adapter_dtype", "optimizer", "cache_text", "mixed_precision", "memory_budget"),
    "host_memory",
    *("truncation", "seed", "log_with", "height", "width", "lora_targets", "true_cfg_scale", "kl_weight"),
    "deterministic",
)


def make_config(options: TrainOptions, device: str, resume_from: str) -> AlignPropConfig:
    """The trainer's config. `device`: "cpu" or a CUDA device.

    Raises:
        ValueError: a value that cannot work, called by its name on the command line.
    """
    from alignprop_fast.training.config import AlignPropConfig

    values = asdict(options)
    fields: dict[str, Any] = {field: values[name] for name, field in _FIELDS.items()}
    fields |= {name: values[name] for name in _SAME_NAME}
    try:
        return AlignPropConfig(
            exp_name="alignprop-fast",
            tracker_project_name=TRACKER,
            lora_alpha=values["lora_alpha"],
            output_dir=options.output_dir,
            logdir=options.output_dir,
            resume_from=resume_from,
            accelerator_kwargs={"cpu": device == "cpu"},
            **fields,
        )
    except ValueError as error:
        names = _FIELDS | {name: name for name in _SAME_NAME}
        flags = {field: "--" + name.replace("_", "-") for name, field in names.items()}
        message = re.sub(r"^\w+", lambda word: flags.get(word[0], word[0]), str(error))
        raise ValueError(message) from error


class ConfigCommand(TyperCommand):
    """A command whose defaults come from the YAML file of --config and, with --resume, from the run's own config.yaml.

    The command line beats --config, which beats the resumed run's file, which beats the built-in defaults.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        defaults: dict[str, Any] = {}
        if not given.get("help"):
            config = given.get("config")
            defaults = self._read(Path(config)) if config else {}
            if given.get("resume") or given.get("resume_from"):
                folder = Path(given.get("output_dir") or defaults.get("output_dir") or DEFAULTS.output_dir)
                own = folder.expanduser() / "config.yaml"
                if not own.is_file():
                    raise typer.BadParameter(f"nothing to resume in {folder} (no config.yaml): leave --resume out")
                defaults = {**self._read(own), **defaults}
        ctx.default_map = defaults
        return super().parse_args(ctx, args)

    def _read(self, path: Path) -> dict[str, Any]:
        """Options in a YAML file, as the texts (lists of them where repeated) that would stand on the command line."""
        content = dict(read_yaml(path))
        if "memory_budget" in content and content["memory_budget"] is None:
            content["memory_budget"] = "none"  # as runs have it that began when that was the default
        known = [
            parameter.name for parameter in self.params if parameter.name not in ("config", "resume", "resume_from")
        ]
        repeated = {parameter.name for parameter in self.params if getattr(parameter, "multiple", False)}
        for key, value in content.items():
            if key not in known:
                close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(known)}"
                raise typer.BadParameter(f"{path} has an unknown option {key!r}; {hint}")
            if isinstance(value, list) and key not in repeated:
                raise typer.BadParameter(f"{path}: {key} must be a single value, such as '{key}: {_example(key)}'")
        return {
            key: [value] if key in repeated and isinstance(value, str) else value
            for key, value in content.items()
            if value is not None
        }


def _example(name: str) -> Any:
    default = getattr(DEFAULTS, name, None)
    return "VALUE" if default is None else default


def _option(panel: str, text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **limits)


_MODEL, _REWARD, _SAMPLING, _TRAINING, _DEVICE, _OUTPUT = (
    *("Model", "Reward and prompts", "Sampling", "Training", "Device and memory", "Output"),
)

Model = Annotated[
    str,
    _option(
        _MODEL,
        "Folder in the diffusers format (SD, SDXL, SD3 or FLUX), a .safetensors file, a Hub id (owner/name), or demo: "
        "the bundled model.",
    ),
]
ModelConfig = Annotated[
    str | None,
    _option(
        _MODEL,
        "For a .safetensors file: folder of a model of the same architecture, for configurations and tokenizers; with "
        "a denoiser alone for everything else.",
        show_default="none",
    ),
]
LoraRank = Annotated[int, _option(_MODEL, "Rank of the LoRA adapters; their size grows with it.", min=1)]
LoraAlpha = Annotated[
    float | None,
    _option(_MODEL, "Adapters are scaled by alpha / rank.", show_default="the rank"),
]
LoraTargetsChoice = Annotated[
    LoraTargets,
    _option(
        _MODEL,
        "Layers with adapters: attention (projections to queries, keys, values, output), attention+ff (feed-forward "
        "layers too) or all (a UNet's convolutions too).",
    ),
]
BasePrecision = Annotated[
    BaseDtype,
    _option(
        _MODEL,
        "How the denoiser's large linear layers are stored: auto (as --mixed-precision says), fp8 or int8 (half of "
        "bf16), nf4 (a quarter; needs bitsandbytes). They are made whole for each product, which costs some time.",
    ),
]
AdapterPrecision = Annotated[
    AdapterDtype,
    _option(_MODEL, "Precision of the adapters; bf16 halves their bytes and rounds at random, so that it learns too."),
]
Reward = Annotated[
    str,
    _option(
        _REWARD,
        "aesthetic, clip, colorfulness, compressibility, count:CLASS=N, hpsv2, imagereward, incompressibility, "
        "pickscore, remove:CLASS; a weighted sum such as clip:1.0,count:apple=3:0.5; or a function of yours, "
        "my_module:my_function.",
    ),
]
RewardModel = Annotated[
    list[str],
    _option(
        _REWARD,
        "Weights of the reward: a file, a folder or a Hub id (owner/name). NAME=PATH where several rewards have "
        "weights, once for each. For count and remove also module:function, a detector of one's own.",
        show_default="the bundled models of clip, count and remove",
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Also read weights in .pt, .pth and .bin files, of rewards and of models that have no others (tensors "
        "only; nothing in them is run).",
        rich_help_panel=_MODEL,
    ),
]
NormaliseRewards = Annotated[
    bool,
    typer.Option(
        "--normalise-rewards",
        help="Divide each part of a sum by the running standard deviation of its scores, so that the weights mean "
        "strength whatever the scales; what is logged stays as it is.",
        rich_help_panel=_REWARD,
    ),
]
PROMPTS_HELP = (
    "A .txt file with a prompt a line (# begins a comment); a .csv, .jsonl or .parquet file or a datasets folder with "
    "a column 'prompt', whose other columns reach the reward as metadata; or a set: demo, demo-heldout, animals, "
    "animals-heldout, general."
)
Prompts = Annotated[str, _option(_REWARD, PROMPTS_HELP)]
NegativePrompt = Annotated[str | None, _option(_SAMPLING, "Negative prompt of every picture.")]
InferenceSteps = Annotated[int, _option(_SAMPLING, "Denoising steps of a picture; time grows with it.", min=1)]
GuidanceScale = Annotated[
    float, _option(_SAMPLING, "Classifier-free guidance; 1 or less turns it off.", min=0, max=100)
]
TrueCfgScale = Annotated[
    float,
    _option(
        _SAMPLING,
        "FLUX: classifier-free guidance against the negative prompt, beside --guidance-scale, which FLUX's network is "
        "told; 1 or less turns it off.",
        min=0,
        max=100,
    ),
]
SchedulerChoice = Annotated[
    SchedulerName,
    _option(
        _SAMPLING,
        "How a step is taken, with the settings of the model's own scheduler; auto: ddim, and flow-euler for SD3 and "
        "FLUX, which have no other.",
    ),
]
Eta = Annotated[float, _option(_SAMPLING, "DDIM noise: 0 none, 1 as much as DDPM.", min=0, max=1)]
_SIDE = "Pixels, a multiple of 8 (SD3 and FLUX: of 16)."
Height = Annotated[int | None, _option(_SAMPLING, _SIDE, show_default="the model's own", min=8)]
Width = Annotated[int | None, _option(_SAMPLING, _SIDE, show_default="the model's own", min=8)]
Steps = Annotated[int, _option(_TRAINING, "Optimizer steps in all.", min=1)]
BatchSize = Annotated[int, _option(_TRAINING, "Pictures that are drawn at once.", min=1)]
Accumulation = Annotated[int, _option(_TRAINING, "Batches per optimizer step; costs time, not memory.", min=1)]
LearningRate = Annotated[float, _option(_TRAINING, "Step size of the optimizer; 1e-4 to 1e-3 for most models.")]
OptimizerChoice = Annotated[
    OptimizerName,
    _option(
        _TRAINING,
        "Bytes of state per adapter parameter: adamw 8; adamw8bit and pagedadamw8bit (paged to the host) 2, lion8bit "
        "1, ademamix8bit 3 (all from bitsandbytes); adafactor 4 / rank; prodigy 16 (from prodigyopt, wants learning "
        "rate 1).",
        case_sensitive=False,
    ),
]
Truncation = Annotated[
    str,
    _option(
        _TRAINING,
        "Denoising steps that carry gradient. uniform: about half of them, drawn anew each time (AlignProp). "
        "uniform-once, gaussian: the last K, K drawn once. full: all. last:K: the last K (DRaFT-K; last:1 is fastest). "
        "lv:N: the last, and again for N noisings of the picture, each with a reward query (DRaFT-LV). drtune, "
        "drtune:K: K (5) of all, reaching early steps at little cost (DRTune). refl: one drawn late step (ReFL).",
    ),
]
Seed = Annotated[
    int, _option(_TRAINING, "Seed of all random numbers; sample picture i has seed + i.", min=0, max=2**32 - 1)
]
MixedPrecision = Annotated[
    Precision, _option(_DEVICE, "Precision of the frozen weights; auto: bf16 on a GPU, fp32 (no) on the CPU.")
]
MemoryBudget = Annotated[
    str,
    _option(
        _DEVICE,
        "What tensors may take on the device in all, weights included, such as 24GiB: what fits stays resident instead "
        "of being computed again. auto: what is free on the GPU (none on the CPU); none: the leanest way, slower.",
    ),
]
HostMemory = Annotated[
    str | None,
    _option(
        _DEVICE,
        "What offloading may lock of the computer's memory, by all processes together, such as 16GiB.",
        show_default="half of what is free here",
    ),
]
CacheText = Annotated[
    bool,
    typer.Option(
        "--cache-text/--no-cache-text",
        help="Encode each prompt once, at the start; the text encoders then leave the GPU.",
        rich_help_panel=_DEVICE,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same bits from run to run on a GPU too, as on the CPU always; costs some speed.",
        rich_help_panel=_DEVICE,
    ),
]
Device = Annotated[str, _option(_DEVICE, "auto (a GPU if there is one), cpu, cuda or cuda:N.")]
OutputDir = Annotated[str, _option(_OUTPUT, "Folder to write to; made if it is not there, never overwritten.")]
SaveEvery = Annotated[int, _option(_OUTPUT, "Optimizer steps between checkpoints; the last 5 are kept.", min=1)]
SampleEvery = Annotated[
    int, _option(_OUTPUT, "Optimizer steps between sample pictures (same prompts and seeds each time).", min=1)
]
LogWith = Annotated[Tracker | None, _option(_OUTPUT, "Send numbers and sample pictures to a tracker as well.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the newest checkpoint in --output-dir, with that run's options.",
        rich_help_panel=_OUTPUT,
    ),
]
ResumeFrom = Annotated[
    str | None, _option(_OUTPUT, "Go on from this checkpoint folder instead, for example if the newest is damaged.")
]
Config = Annotated[
    str | None,
    _option(_OUTPUT, "YAML file of options, 'batch_size: 4' a line, read as on the command line, which beats it."),
]
