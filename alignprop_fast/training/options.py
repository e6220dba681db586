"""The options of a training run, each declared once. See `declaration` for what comes of a declaration.

To add one: a field in `TrainerOptions`, if the trainer reads it from its config, or else in one of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignprop_fast.training.declaration import Command, Panel, like, option

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


_SIDE: dict[str, Any] = {
    "help": "Pixels, a multiple of 8 (SD3 and FLUX: of 16).",
    "panel": Panel.SAMPLING,
    "commands": TRAIN | PICTURES,
    "shown": "the model's own",
    "at_least": 8,
    "unit": "pixels",
    "remedy": "a multiple of 8 of at least 8, or leave it out",
    "changes_plan": True,
}


@dataclass
class TrainerOptions:
    """The fields of `AlignPropConfig` that trl's has not. Those without commands are for Python alone."""

    output_dir: str | None = option(
        None,
        "Folder to write to; made if it is not there, never overwritten.",
        Panel.OUTPUT,
        commands=TRAIN | PICTURES | Command.DEMO | Command.PLAN,
    )
    memory_budget: int | str | None = option(
        "auto",
        "What tensors may take on the device in all, weights included, such as 24GiB: what fits stays resident instead "
        "of being computed again. auto: what is free on the GPU (none on the CPU); none: the leanest way, slower.",
        Panel.DEVICE,
        changes_plan=True,
    )
    host_memory: int | str | None = option(
        None,
        "What offloading may lock of the computer's memory, by all processes together, such as 16GiB.",
        Panel.DEVICE,
        shown="half of what is free here",
        changes_plan=True,
    )
    truncation: str | None = option(
        None,
        "Denoising steps that carry gradient. uniform: about half of them, drawn anew each time (AlignProp). "
        "uniform-once, gaussian: the last K, K drawn once. full: all. last:K: the last K (DRaFT-K; last:1 is fastest). "
        "lv:N: the last, and again for N noisings of the picture, each with a reward query (DRaFT-LV). drtune, "
        "drtune:K: K (5) of all, reaching early steps at little cost (DRTune). refl: one drawn late step (ReFL).",
        Panel.TRAINING,
        changes_plan=True,
    )
    kl_weight: float = option(
        0.0,
        "Weight of a regulariser: the mean squared difference of the model's output to the base model's. Higher keeps "
        "pictures closer to it; costs up to twice the time of a gradient step. A cheaper remedy after training: scale "
        "the adapters down by alignprop-fast merge RUN:0.7.",
        Panel.CONTROL,
        at_least=0,
        remedy="0 (off) or more",
        changes_plan=True,
    )
    lora_rank: int = option(
        4, "Rank of the LoRA adapters; their size grows with it.", Panel.MODEL, at_least=1, changes_plan=True
    )
    lora_alpha: float | None = option(
        None, "Adapters are scaled by alpha / rank.", Panel.MODEL, shown="the rank", above=0
    )
    base_dtype: str = option(
        "auto",
        "How the denoiser's large linear layers are stored: auto (as --mixed-precision says), fp8 or int8 (half of "
        "bf16), nf4 (a quarter; needs bitsandbytes). They are made whole for each product, which costs some time.",
        Panel.MODEL,
        choices=("auto", "fp8", "int8", "nf4"),
        changes_plan=True,
    )
    adapter_dtype: str = option(
        "fp32",
        "Precision of the adapters; bf16 halves their bytes and rounds at random, so that it learns too.",
        Panel.MODEL,
        choices=("fp32", "bf16"),
        changes_plan=True,
    )
    optimizer: str = option(
        "adamw",
        "Bytes of state per adapter parameter: adamw 8; adamw8bit and pagedadamw8bit (paged to the host) 2, lion8bit "
        "1, ademamix8bit 3 (all from bitsandbytes); adafactor 4 / rank; prodigy 16 (from prodigyopt, wants learning "
        "rate 1).",
        Panel.TRAINING,
        choices=("adamw", "adamw8bit", "pagedadamw8bit", "lion8bit", "ademamix8bit", "adafactor", "prodigy"),
        changes_plan=True,
    )
    optimizer_in_backward: bool = option(
        False,
        "Full fine-tuning only: step each parameter in the backward pass as soon as its gradient is complete, and free "
        "it. train_max_grad_norm then clips each tensor's gradient by itself.",
        commands=Command.NONE,
    )
    lr_scheduler: str = option(
        "constant",
        "How the learning rate goes on after the warm-up: constant, or down to 0 at the last step, linear or cosine.",
        Panel.TRAINING,
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = option(
        0,
        "Optimizer steps over which the learning rate rises from 0 to its full value.",
        Panel.TRAINING,
        at_least=0,
        remedy="0 (off) or more",
    )
    ema_decay: float = option(
        0.0,
        "Keep an exponential moving average of the adapters with this decay, such as 0.99: sample pictures are drawn "
        "with it, and it is written to the folder averaged in --output-dir. 0 turns it off.",
        Panel.TRAINING,
        at_least=0,
        below=1,
        remedy="0 (off) or more, and below 1",
        changes_plan=True,
    )
    cache_text: bool = option(
        True,
        "Encode each prompt once, at the start; the text encoders then leave the GPU.",
        Panel.DEVICE,
        changes_plan=True,
    )
    max_bad_steps: int = option(
        10,
        "Stop after so many optimizer steps in a row with a loss or gradient that is not finite.",
        at_least=1,
        commands=Command.NONE,
    )
    height: int | None = option(None, **_SIDE)
    width: int | None = option(None, **_SIDE)
    guidance_rescale: float = option(
        0.0,
        "phi of Lin et al. 2023; 0 turns it off.",
        at_least=0,
        at_most=1,
        remedy="0 (off) to 1",
        commands=Command.NONE,
    )
    lora_targets: str = option(
        "attention",
        "Layers with adapters: attention (projections to queries, keys, values, output), attention+ff (feed-forward "
        "layers too) or all (a UNet's convolutions too).",
        Panel.MODEL,
        choices=("attention", "attention+ff", "all"),
        changes_plan=True,
    )
    true_cfg_scale: float = option(
        1.0,
        "FLUX: classifier-free guidance against the negative prompt, beside --guidance-scale, which FLUX's network is "
        "told; 1 or less turns it off.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        at_least=0,
        at_most=100,
        changes_plan=True,
    )
    cuda_graphs: bool = option(
        False,
        "Experimental: run evaluations without gradient as CUDA graphs. Needs a GPU; no speed is measured yet.",
        Panel.DEVICE,
        changes_plan=True,
    )
    compiled: bool = option(
        False,
        "Experimental: run the transformer blocks of evaluations without gradient through torch.compile. Needs a GPU; "
        "no speed is measured yet.",
        Panel.DEVICE,
    )
    deterministic: bool = option(
        False,
        "The same bits from run to run on a GPU too, as on the CPU always; costs some speed.",
        Panel.DEVICE,
        commands=TRAIN | Command.DOCTOR,
    )


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
