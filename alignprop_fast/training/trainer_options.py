"""The fields that `AlignPropConfig` adds to trl's, each declared once. See `declaration` and `options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignprop_fast.training.declaration import Command, Panel, option

TRAIN, PICTURES = Command.TRAIN, Command.PICTURES

_SIDE: dict[str, Any] = {
    "help": "In pixels, a multiple of 8 (16 for transformers).",
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
    """The fields that `AlignPropConfig` adds to trl's. Those without commands are only for Python."""

    output_dir: str | None = option(
        None,
        "Folder to write to; created if needed, never overwritten.",
        Panel.OUTPUT,
        commands=TRAIN | PICTURES | Command.DEMO | Command.PLAN,
    )
    memory_budget: int | str | None = option(
        "auto",
        "Memory that tensors may take on the device, weights included, such as 24GiB. What fits is kept instead of "
        "being computed again. auto: what is free on the GPU (on the CPU: none). none: the least memory, but slower.",
        Panel.DEVICE,
        changes_plan=True,
    )
    host_memory: int | str | None = option(
        None,
        "Host memory that offloading may lock, for all processes together, such as 16GiB. 0: nothing is offloaded.",
        Panel.DEVICE,
        shown="half of what is free here",
        changes_plan=True,
    )
    truncation: str | None = option(
        None,
        "Denoising steps that carry gradient. auto: full up to 8 steps, uniform for longer chains. uniform: about half "
        "of them, drawn anew each time (AlignProp). uniform-once, gaussian: the last K, with K drawn once. full: all. "
        "last:K: the last K (DRaFT-K; last:1 is fastest). lv:N: the last, and again for N noisings of the picture, "
        "each with a reward query (DRaFT-LV). "
        "drtune, drtune:K: K (5) of all, which reaches early steps cheaply (DRTune). refl: one late step, drawn "
        "at random (ReFL). discount:GAMMA: all, with weights that fall toward the noise. leapalign, flowbp-sparse:K, "
        "flowbp-bridge:K, flowbp-lagrange: two to K steps whose weights stand for all. srpo, srpo:N: the picture, "
        "noised to N (1) drawn steps and recovered by each (docs/truncation.md).",
        Panel.TRAINING,
        changes_plan=True,
    )
    kl_weight: float = option(
        0.0,
        "Weight of a regulariser: the mean squared difference between the outputs of the model and of the base model. "
        "A higher weight keeps pictures closer to the base model's. A gradient step takes up to twice as long. A "
        "cheaper remedy after training is to scale the adapters down: alignprop-fast merge RUN:0.7.",
        Panel.CONTROL,
        at_least=0,
        remedy="0 (off) or more",
        changes_plan=True,
    )
    lora_rank: int = option(
        4, "Rank of the LoRA adapters; a higher one makes them larger.", Panel.MODEL, at_least=1, changes_plan=True
    )
    lora_alpha: float | None = option(
        None, "Adapters are scaled by alpha / rank.", Panel.MODEL, shown="the rank", above=0
    )
    base_dtype: str = option(
        "auto",
        "How the denoiser's large linear layers are stored: auto (as --mixed-precision says), fp8 or int8 (half of "
        "bf16), nf4 (a quarter; needs bitsandbytes). They are dequantised for each product, which takes some time.",
        Panel.MODEL,
        choices=("auto", "fp8", "int8", "nf4"),
        changes_plan=True,
    )
    adapter_dtype: str = option(
        "fp32",
        "Precision of the adapters. bf16 halves their bytes; its stochastic rounding keeps small updates.",
        Panel.MODEL,
        choices=("fp32", "bf16"),
        changes_plan=True,
    )
    optimizer: str = option(
        "adamw",
        "Bytes of state per adapter parameter: adamw 8; adamw8bit and pagedadamw8bit (paged to the host) 2, lion8bit "
        "1, ademamix8bit 3 (all from bitsandbytes); adafactor 4 / rank; prodigy 16 (from prodigyopt, needs learning "
        "rate 1).",
        Panel.TRAINING,
        choices=("adamw", "adamw8bit", "pagedadamw8bit", "lion8bit", "ademamix8bit", "adafactor", "prodigy"),
        changes_plan=True,
    )
    optimizer_in_backward: bool = option(
        False,
        "Full fine-tuning only: step each parameter in the backward pass as soon as its gradient is complete, and free "
        "the gradient. train_max_grad_norm then clips the gradient of each tensor separately.",
        commands=Command.NONE,
    )
    lr_scheduler: str = option(
        "constant",
        "Learning rate after the warm-up: constant, or falling to 0 at the last step (linear or cosine).",
        Panel.TRAINING,
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = option(
        0,
        "Optimizer steps over which the learning rate rises from 0 to its full value. At rate 0 the first step changes "
        "nothing.",
        Panel.TRAINING,
        at_least=0,
        remedy="0 (off) or more",
    )
    ema_decay: float = option(
        0.0,
        "Keep an exponential moving average of the adapters with this decay, such as 0.99. Sample pictures are drawn "
        "with it, and it is written to the folder ema in --output-dir. 0 turns it off.",
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
        "Stop after this many optimizer steps in a row whose loss or gradient is not finite.",
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
        "FLUX.1 and Qwen-Image only: classifier-free guidance against --negative-prompt; none without that prompt. "
        "1 or less turns it off. Qwen-Image has no other. For FLUX.1, --guidance-scale is an input of the network.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        at_least=0,
        at_most=100,
        changes_plan=True,
    )
    cfg_normalization: float = option(
        0.0,
        "Z-Image only, as in its pipeline: the norm of the guided prediction is at most this many times that of the "
        "prediction with the prompt; 0 sets no limit.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        at_least=0,
        remedy="0 (off) or more",
        changes_plan=True,
    )
    cfg_truncation: float = option(
        1.0,
        "Z-Image only, as in its pipeline: steps at which more than this share of the noise is gone run without "
        "guidance, in half the time; 1: none of them. Plans count every step as guided.",
        Panel.SAMPLING,
        commands=TRAIN | PICTURES,
        at_least=0,
        at_most=1,
    )
    cuda_graphs: str = option(
        "auto",
        "Run evaluations without gradient and replays as CUDA graphs. auto: on a GPU, where a measurement at first use "
        "says that they are faster and the memory that they keep has no better use. on: even if they are no faster.",
        Panel.DEVICE,
        choices=("auto", "on", "off"),
        changes_plan=True,
    )
    compiled: bool = option(
        False,
        "Experimental: let the transformer blocks of evaluations without gradient run through torch.compile, if a "
        "measurement at first use says that it is faster. Needs a GPU. Plans ignore its speed.",
        Panel.DEVICE,
    )
    sampling_precision: str = option(
        "exact",
        "Of denoising steps that carry no gradient: the gradient takes their results as constants. int8 and fp8 (from "
        "RTX 40 and H100 on): large matrix products run in 8 bits where that is faster, with a second copy of the "
        "weights. bf16: for a run in fp32. merged: adapters are added into a second copy of their weights, once per "
        "training step. Steps with gradient, sample pictures and evaluations stay exact.",
        Panel.DEVICE,
        choices=("exact", "bf16", "fp8", "int8", "merged"),
        changes_plan=True,
    )
    deterministic: bool = option(
        False,
        "Make runs on a GPU repeatable to the bit, as they always are on the CPU; costs some speed, which a plan knows "
        "only where it is measured.",
        Panel.DEVICE,
        commands=TRAIN | Command.DOCTOR,
        changes_plan=True,
    )
