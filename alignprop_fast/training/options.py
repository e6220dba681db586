"""The options of a training run, each declared once; those that the trainer alone knows are in `trainer_options`.

See `declaration` for what comes of a declaration. To add an option: a field in `TrainerOptions` if the trainer reads it
from its config, else in `InputOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignprop_fast.training.declaration import Command, Panel, like, option
from alignprop_fast.training.trainer_options import TrainerOptions

PROMPTS_HELP = (
    "A .txt file with a prompt a line (# begins a comment); a .csv, .jsonl or .parquet file or a datasets folder with "
    "a column 'prompt', whose other columns reach the reward as metadata; or a set: demo, demo-heldout, animals, "
    "animals-heldout, general."
)
TRAIN, PICTURES = Command.TRAIN, Command.PICTURES


@dataclass
class InputOptions:
    """Options of the command line that the trainer's config has not, or by trl's names."""

    model: str = option(
        "demo",
        "Folder in the diffusers format (SD, SDXL, SD3 or FLUX), a .safetensors file, a Hub id (owner/name), or demo: "
        "the bundled model.",
        Panel.MODEL,
        commands=TRAIN | PICTURES,
        changes_plan=True,
    )
    model_config: str | None = option(
        None,
        "For a .safetensors file: folder of a model of the same architecture, for configurations and tokenizers; with "
        "a denoiser alone for everything else.",
        Panel.MODEL,
        commands=TRAIN | PICTURES,
        shown="none",
        changes_plan=True,
    )
    allow_pickle: bool = option(
        False,
        "Also read weights in .pt, .pth and .bin files, of rewards and of models that have no others (tensors only; "
        "nothing in them is run).",
        Panel.MODEL,
        commands=TRAIN | PICTURES | Command.PLAN,
    )
    reward: str = option(
        "clip",
        "aesthetic, clip, colorfulness, compressibility, count:CLASS=N, hpsv2, imagereward, incompressibility, "
        "pickscore, remove:CLASS; a weighted sum such as clip:1.0,count:apple=3:0.5; or a function of yours, "
        "my_module:my_function.",
        Panel.REWARD,
        commands=TRAIN | Command.DEMO | Command.EVALUATE,
        changes_plan=True,
    )
    reward_model: tuple[str, ...] = option(
        (),
        "Weights of the reward: a file, a folder or a Hub id (owner/name). NAME=PATH where several rewards have "
        "weights, once for each. For count and remove also module:function, a detector of one's own.",
        Panel.REWARD,
        commands=TRAIN | Command.EVALUATE | Command.MERGE,
        shown="the bundled models of clip, count and remove",
        changes_plan=True,
    )
    normalise_rewards: bool = option(
        False,
        "Divide each part of a sum by the running standard deviation of its scores, so that the weights mean strength "
        "whatever the scales; what is logged stays as it is.",
        Panel.REWARD,
    )
    prompts: str = option("demo", PROMPTS_HELP, Panel.REWARD, commands=TRAIN | PICTURES, changes_plan=True)
    negative_prompt: str | None = option(
        None,
        "Negative prompt of every picture.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        field="negative_prompts",
        changes_plan=True,
    )
    num_inference_steps: int = option(
        50,
        "Denoising steps of a picture; time grows with it.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        field="sample_num_steps",
        at_least=1,
        changes_plan=True,
    )
    guidance_scale: float = option(
        5.0,
        "Classifier-free guidance; 1 or less turns it off.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        field="sample_guidance_scale",
        at_least=0,
        at_most=100,
        changes_plan=True,
    )
    scheduler: str = option(
        "auto",
        "How a step is taken, with the settings of the model's own scheduler; auto: ddim, and flow-euler for SD3 and "
        "FLUX, which have no other.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        choices=("auto", "ddim", "euler", "euler-ancestral", "dpm++2m", "flow-euler"),
        changes_plan=True,
    )
    eta: float = option(
        1.0,
        "DDIM noise: 0 none, 1 as much as DDPM.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        field="sample_eta",
        at_least=0,
        at_most=1,
    )
    steps: int = option(
        100, "Optimizer steps in all.", Panel.TRAINING, commands=TRAIN | Command.DEMO, field="num_epochs", at_least=1
    )
    batch_size: int = option(
        4,
        "Pictures that are drawn at once.",
        Panel.TRAINING,
        commands=TRAIN | PICTURES,
        field="train_batch_size",
        at_least=1,
        changes_plan=True,
    )
    gradient_accumulation_steps: int = option(
        1,
        "Batches per optimizer step; costs time, not memory.",
        Panel.TRAINING,
        field="train_gradient_accumulation_steps",
        at_least=1,
    )
    learning_rate: float = option(
        1e-3,
        "Step size of the optimizer; 1e-4 to 1e-3 for most models.",
        Panel.TRAINING,
        field="train_learning_rate",
        above=0,
    )
    max_grad_norm: float = option(
        1.0,
        "Gradients are scaled down to this norm where theirs is larger.",
        Panel.TRAINING,
        field="train_max_grad_norm",
        above=0,
    )
    seed: int = option(
        0,
        "Seed of all random numbers; sample picture i has seed + i.",
        Panel.TRAINING,
        commands=TRAIN | Command.DEMO | PICTURES,
        at_least=0,
        at_most=2**32 - 1,
    )
    mixed_precision: str = option(
        "auto",
        "Precision of the frozen weights; auto: bf16 on a GPU, fp32 (no) on the CPU.",
        Panel.DEVICE,
        commands=TRAIN | PICTURES,
        choices=("auto", "no", "bf16", "fp16"),
        changes_plan=True,
    )
    device: str = option(
        "auto",
        "auto (a GPU if there is one), cpu, cuda or cuda:N.",
        Panel.DEVICE,
        commands=TRAIN | PICTURES | Command.DOCTOR,
    )


@dataclass
class WatchOptions:
    """Options of the command line against over-optimisation."""

    watch_reward: str | None = option(
        None,
        "A reward that is not trained for, as in --reward: scored at every sampling, logged and plotted.",
        Panel.CONTROL,
        shown="none",
        changes_plan=True,
    )
    watch_reward_model: tuple[str, ...] = option(
        (), "Weights of --watch-reward, as in --reward-model.", Panel.CONTROL, changes_plan=True
    )
    watch_prompts: str | None = option(
        None,
        "Prompts that are watched, as in --prompts. Without --watch-reward the trained reward is watched on them.",
        Panel.CONTROL,
        shown="the held-out set of --prompts if there is one, else --prompts",
        changes_plan=True,
    )
    watch_pictures: int = option(
        16, "Pictures that are watched: two of each prompt, always with the same seeds.", Panel.CONTROL, at_least=2
    )
    diversity_model: str | None = option(
        None,
        "CLIP model (folder or Hub id) of the diversity that is watched.",
        Panel.CONTROL,
        commands=TRAIN | Command.EVALUATE,
        shown="the bundled one",
        changes_plan=True,
    )
    patience: int | None = option(
        None,
        "Stop after so many samplings in a row whose watched score lies below the best so far by more than --max-drop; "
        "the LoRA that is written is then that of the last sampling before them.",
        Panel.CONTROL,
        shown="never stop",
        at_least=1,
    )
    max_drop: float = option(0.0, "What the watched score may lose, in its own units.", Panel.CONTROL, at_least=0)


@dataclass
class TrainOptions(TrainerOptions, WatchOptions, InputOptions):
    """A training run, as config.yaml holds it. Fields come in the order of the bases from right to left.

    Each other command has a class of its own options that inherits these, and takes those that name it.
    """

    output_dir: str = like(TrainerOptions, "output_dir", "alignprop-output")
    truncation: str = like(TrainerOptions, "truncation", "uniform")
    save_every: int = option(
        10, "Optimizer steps between checkpoints; the last 5 are kept.", Panel.OUTPUT, field="save_freq", at_least=1
    )
    sample_every: int = option(
        10, "Optimizer steps between sample pictures (same prompts and seeds each time).", Panel.OUTPUT, at_least=1
    )
    log_with: str | None = option(
        None,
        "Send numbers and sample pictures to a tracker as well.",
        Panel.OUTPUT,
        choices=("wandb", "tensorboard", "trackio"),
    )


@dataclass
class PictureOptions(TrainOptions):
    """What the commands that draw pictures say otherwise."""

    prompts: str = like(InputOptions, "prompts", panel=Panel.PROMPTS)
    images_per_prompt: int = option(
        1, "Pictures of each prompt.", Panel.PROMPTS, commands=Command.SAMPLE | Command.EVALUATE, at_least=1
    )
    seed: int = like(
        InputOptions, "seed", help="Picture i has seed + i, whatever the batch size.", panel=Panel.SAMPLING
    )
