"""The options of a training run, each declared once; the trainer's own are in `trainer_options`.

`declaration` says what is made from a declaration. To add an option, add a field: to `TrainerOptions` if the trainer
reads it from its config, otherwise to `InputOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignprop_fast.training.declaration import Command, Panel, like, option
from alignprop_fast.training.trainer_options import TrainerOptions

PROMPTS_HELP = (
    "A .txt file with one prompt per line (# starts a comment); a .csv, .jsonl or .parquet file or a datasets folder "
    "with a column 'prompt', whose other columns reach the reward as metadata; or a set: demo, demo-heldout, "
    "same-colour, same-colour-heldout, animals, animals-heldout, general."
)
TRAIN, PICTURES = Command.TRAIN, Command.PICTURES


@dataclass
class InputOptions:
    """Options of the command line that the trainer's config lacks, or has under trl's names."""

    model: str = option(
        "demo",
        "Folder in the diffusers format (SD, SDXL, SD3, FLUX, Chroma, Z-Image, Qwen-Image, Krea 2, Lumina 2 or SANA), "
        "a .safetensors file, a Hub id (owner/name), or a bundled model: demo, or demo-twin, which draws in 4 steps "
        "without guidance.",
        Panel.MODEL,
        commands=TRAIN | PICTURES,
        changes_plan=True,
    )
    model_config: str | None = option(
        None,
        "For a .safetensors file: folder of a model of the same architecture, for configurations and tokenizers. If "
        "the file holds only a denoiser, everything else is loaded from there too.",
        Panel.MODEL,
        commands=TRAIN | PICTURES,
        shown="none",
        changes_plan=True,
    )
    allow_pickle: bool = option(
        False,
        "Also read .pt, .pth and .bin files, if a reward or model has no other weights. Only tensors are read; no code "
        "in the files is run.",
        Panel.MODEL,
        commands=TRAIN | PICTURES | Command.PLAN,
    )
    reward: str = option(
        "clip",
        "aesthetic, clip, colorfulness, compressibility, count:CLASS=N, hpsv2, imagereward, incompressibility, "
        "pickscore, remove:CLASS; a weighted sum such as clip:1.0,count:apple=3:0.5; or your own function, "
        "my_module:my_function.",
        Panel.REWARD,
        commands=TRAIN | Command.DEMO | Command.EVALUATE,
        changes_plan=True,
    )
    reward_model: tuple[str, ...] = option(
        (),
        "Weights of the reward: a file, a folder or a Hub id (owner/name). If several rewards have weights, give "
        "NAME=PATH once for each. For count and remove also module:function, your own detector.",
        Panel.REWARD,
        commands=TRAIN | Command.EVALUATE | Command.MERGE,
        shown="the bundled models of clip, count and remove",
        changes_plan=True,
    )
    normalise_rewards: bool = option(
        False,
        "Divide each part of a sum by the running standard deviation of its scores, so that the weights compare parts "
        "of different scales. Logged scores are not divided.",
        Panel.REWARD,
    )
    reward_words: str | None = option(
        None,
        "POSITIVE|NEGATIVE: score a picture by how much better it fits its prompt with the first text before it than "
        "with the second, such as 'a sharp photo of|a blurry photo of' (SRPO). The reward runs twice.",
        Panel.REWARD,
        changes_plan=True,
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
    num_inference_steps: int | None = option(
        None,
        "Denoising steps per picture; more take longer.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        field="sample_num_steps",
        shown="the model's own: 4 or 8 for distilled ones, 20 to 35 for Krea 2, Chroma, Lumina 2, SANA; else 50",
        at_least=1,
        changes_plan=True,
    )
    guidance_scale: float | None = option(
        None,
        "Classifier-free guidance, as the pipeline counts it; 1 or less turns it off (0 for Z-Image and Krea 2).",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        field="sample_guidance_scale",
        shown="the model's own: none if distilled or Qwen-Image, 4 for FLUX.2, Lumina 2, 4.5 for Krea 2, SANA, else 5",
        at_least=0,
        at_most=100,
        changes_plan=True,
    )
    scheduler: str = option(
        "auto",
        "Solver of the denoising steps, with the settings of the model's own scheduler. auto: ddim; flow-euler for "
        "transformers, which support no other; dpm++2m for SANA.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        choices=("auto", "ddim", "euler", "euler-ancestral", "dpm++2m", "flow-euler"),
        changes_plan=True,
    )
    eta: float = option(
        1.0,
        "Noise of DDIM: 0 is none, 1 is as much as DDPM.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        field="sample_eta",
        at_least=0,
        at_most=1,
    )
    steps: int = option(
        100, "Optimizer steps in total.", Panel.TRAINING, commands=TRAIN | Command.DEMO, field="num_epochs", at_least=1
    )
    batch_size: int = option(
        4,
        "Pictures per batch, drawn together.",
        Panel.TRAINING,
        commands=TRAIN | PICTURES,
        field="train_batch_size",
        at_least=1,
        changes_plan=True,
    )
    gradient_accumulation_steps: int = option(
        1,
        "Batches per optimizer step; more cost time, not memory.",
        Panel.TRAINING,
        field="train_gradient_accumulation_steps",
        at_least=1,
    )
    learning_rate: float = option(
        1e-3,
        "Learning rate of the optimizer; 1e-4 to 1e-3 for most models.",
        Panel.TRAINING,
        field="train_learning_rate",
        above=0,
    )
    max_grad_norm: float = option(
        1.0,
        "Gradients with a larger norm are scaled down to this one; inf turns this off.",
        Panel.TRAINING,
        field="train_max_grad_norm",
        above=0,
        remedy="a number above 0, or inf (off)",
        may_be_infinite=True,
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
        "A reward that is not trained on, named as in --reward. It is scored at every sampling, logged and plotted.",
        Panel.CONTROL,
        shown="none",
        changes_plan=True,
    )
    watch_reward_model: tuple[str, ...] = option(
        (), "Weights of --watch-reward, given as in --reward-model.", Panel.CONTROL, changes_plan=True
    )
    watch_prompts: str | None = option(
        None,
        "Prompts for watching, given as in --prompts. Without --watch-reward the trained reward is watched on them.",
        Panel.CONTROL,
        shown="the held-out set of --prompts if there is one, else --prompts",
        changes_plan=True,
    )
    watch_pictures: int = option(
        16, "Pictures for watching: two of each prompt, always with the same seeds.", Panel.CONTROL, at_least=2
    )
    diversity_model: str | None = option(
        None,
        "CLIP model (folder or Hub id) that measures the diversity of the watched pictures.",
        Panel.CONTROL,
        commands=TRAIN | Command.EVALUATE,
        shown="the bundled one",
        changes_plan=True,
    )
    patience: int | None = option(
        None,
        "Stop after this many samplings in a row whose watched score is more than --max-drop below the best so far. "
        "The LoRA of the last sampling before them is then the result.",
        Panel.CONTROL,
        shown="never stop",
        at_least=1,
    )
    max_drop: float = option(0.0, "How much the watched score may drop, in its own units.", Panel.CONTROL, at_least=0)


@dataclass
class TrainOptions(TrainerOptions, WatchOptions, InputOptions):
    """A training run as in config.yaml. The fields of the bases come first, from the last base to the first.

    Each other command has a class with its own options. It inherits from this one, and takes the options that name it.
    """

    output_dir: str = like(TrainerOptions, "output_dir", "alignprop-output")
    truncation: str = like(TrainerOptions, "truncation", "auto")
    true_cfg_scale: float | None = like(  # type: ignore[assignment]
        TrainerOptions, "true_cfg_scale", None, shown="the model's own: 4 for Qwen-Image, 1 for FLUX.1"
    )
    save_every: int = option(
        10, "Optimizer steps between checkpoints; the last 5 are kept.", Panel.OUTPUT, field="save_freq", at_least=1
    )
    sample_every: int = option(
        10, "Optimizer steps between sample pictures (same prompts and seeds each time).", Panel.OUTPUT, at_least=1
    )
    log_with: str | None = option(
        None,
        "Also send metrics and sample pictures to a tracker.",
        Panel.OUTPUT,
        choices=("wandb", "tensorboard", "trackio"),
    )


@dataclass
class PictureOptions(TrainOptions):
    """Options that differ in the commands that draw pictures."""

    prompts: str = like(InputOptions, "prompts", panel=Panel.PROMPTS)
    images_per_prompt: int = option(
        1, "Pictures per prompt.", Panel.PROMPTS, commands=Command.SAMPLE | Command.EVALUATE, at_least=1
    )
    seed: int = like(InputOptions, "seed", help="Picture i has seed + i, for every batch size.", panel=Panel.SAMPLING)
