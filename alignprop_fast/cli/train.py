"""The command `train`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from alignprop_fast.cli import options as o
from alignprop_fast.cli import options_control as c
from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import DEFAULTS, TrainOptions
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import go_on_by, plain, process_count, quiet_libraries, run_errors, setup_errors

if TYPE_CHECKING:
    from alignprop_fast.cli.session import Session
    from alignprop_fast.report.pictures import Pictures


def train(
    ctx: typer.Context,
    model: o.Model = DEFAULTS.model,
    model_config: o.ModelConfig = DEFAULTS.model_config,
    lora_rank: o.LoraRank = DEFAULTS.lora_rank,
    lora_alpha: o.LoraAlpha = DEFAULTS.lora_alpha,
    lora_targets: o.LoraTargetsChoice = o.LoraTargets.attention,
    base_dtype: o.BasePrecision = o.BaseDtype.auto,
    adapter_dtype: o.AdapterPrecision = o.AdapterDtype.fp32,
    reward: o.Reward = DEFAULTS.reward,
    reward_model: o.RewardModel = [],  # noqa: B006  # typer wants a list, and copies it
    allow_pickle: o.AllowPickle = DEFAULTS.allow_pickle,
    normalise_rewards: o.NormaliseRewards = DEFAULTS.normalise_rewards,
    prompts: o.Prompts = DEFAULTS.prompts,
    negative_prompt: o.NegativePrompt = DEFAULTS.negative_prompt,
    num_inference_steps: o.InferenceSteps = DEFAULTS.num_inference_steps,
    guidance_scale: o.GuidanceScale = DEFAULTS.guidance_scale,
    true_cfg_scale: o.TrueCfgScale = DEFAULTS.true_cfg_scale,
    scheduler: o.SchedulerChoice = o.SchedulerName.auto,
    eta: o.Eta = DEFAULTS.eta,
    height: o.Height = DEFAULTS.height,
    width: o.Width = DEFAULTS.width,
    steps: o.Steps = DEFAULTS.steps,
    batch_size: o.BatchSize = DEFAULTS.batch_size,
    gradient_accumulation_steps: o.Accumulation = DEFAULTS.gradient_accumulation_steps,
    learning_rate: o.LearningRate = DEFAULTS.learning_rate,
    optimizer: o.OptimizerChoice = o.OptimizerName.adamw,
    truncation: o.Truncation = DEFAULTS.truncation,
    kl_weight: c.KlWeight = DEFAULTS.kl_weight,
    watch_reward: c.WatchReward = DEFAULTS.watch_reward,
    watch_reward_model: c.WatchRewardModel = [],  # noqa: B006
    watch_prompts: c.WatchPrompts = DEFAULTS.watch_prompts,
    watch_pictures: c.WatchPictures = DEFAULTS.watch_pictures,
    diversity_model: c.DiversityModel = DEFAULTS.diversity_model,
    patience: c.Patience = DEFAULTS.patience,
    max_drop: c.MaxDrop = DEFAULTS.max_drop,
    seed: o.Seed = DEFAULTS.seed,
    mixed_precision: o.MixedPrecision = o.Precision.auto,
    memory_budget: o.MemoryBudget = DEFAULTS.memory_budget,
    host_memory: o.HostMemory = DEFAULTS.host_memory,
    cache_text: o.CacheText = DEFAULTS.cache_text,
    deterministic: o.Deterministic = DEFAULTS.deterministic,
    device: o.Device = DEFAULTS.device,
    output_dir: o.OutputDir = DEFAULTS.output_dir,
    save_every: o.SaveEvery = DEFAULTS.save_every,
    sample_every: o.SampleEvery = DEFAULTS.sample_every,
    log_with: o.LogWith = None,
    resume: o.Resume = False,
    resume_from: o.ResumeFrom = None,
    config: o.Config = None,
) -> None:
    """Fine-tune LoRA adapters by the gradient of a reward.

    Leaves pytorch_lora_weights.safetensors (for diffusers' load_lora_weights), kohya_lora_weights.safetensors (for
    ComfyUI and others), before_after.png, reward.png, README.md (a model card), samples/, metrics.jsonl, checkpoints/,
    config.yaml and versions.json in --output-dir. Ctrl-C and SIGTERM save a checkpoint.

    **Examples**

    - `alignprop-fast train --reward colorfulness --num-inference-steps 12 --output-dir colourful`
    - `alignprop-fast train --model path/to/sd15 --reward-model path/to/clip --prompts animals --memory-budget 24GiB`
    - `alignprop-fast train --reward colorfulness --watch-reward clip --patience 2 --max-drop 0.02 --output-dir held`
    - `alignprop-fast train --resume --output-dir colourful`
    - `accelerate launch --num-processes 4 -m alignprop_fast train --model path/to/sd15 --prompts animals` (four GPUs)
    """
    chosen: dict[str, Any] = {field.name: plain(ctx.params[field.name]) for field in fields(TrainOptions)}
    console, folder = make_console(), ctx.with_resource(OutputFolder(output_dir, several=True))
    with setup_errors():
        if process_count() == 1:  # several are to meet first, and then say it once
            folder.check()
        quiet_libraries(console)
        from alignprop_fast.cli.session import Session

        session = Session(TrainOptions(**chosen), console, folder, resume=resume, resume_from=resume_from)
    start = session.trainer.steps_done
    what = f"{session.options.model} on {session.options.reward}"
    console.print(f"training {what}, step {start} of {steps}", soft_wrap=True)
    _print_plan(console, session)
    with run_errors(session.folder, go_on_by(session.folder)):
        session.run()
    if session.is_main:
        print_results(console, session.folder, {"sample prompts": (session.before, session.after)})
        _print_peak(console, session)


def _print_plan(console: Console, session: Session) -> None:
    from alignprop_fast.cli.plan_summary import print_prediction

    if session.prediction is None:
        hint = "every gradient step runs again in the backward pass, the leanest way; --memory-budget SIZE saves time"
        console.print(f"no memory budget: {hint}, and alignprop-fast plan says how much", soft_wrap=True)
        return
    if session.options.memory_budget == "auto":
        console.print(session.trainer.sampler.budget_note, soft_wrap=True)
    print_prediction(console, session.prediction)


def _print_peak(console: Console, session: Session) -> None:
    """The measured peak beside the predicted one, where both are known."""
    from alignprop_fast.planner import format_bytes

    if session.prediction is None or not session.peak_bytes:
        return
    predicted, measured = session.prediction.worst.peak_bytes, format_bytes(session.peak_bytes)
    line = f"peak:     predicted {format_bytes(predicted)} in the worst case, measured {measured}"
    if session.trainer.accelerator.device.type != "cuda":
        line = (
            f"peak:     predicted {format_bytes(predicted)} of tensors in the worst case; the process took {measured} "
            "with its libraries, which is all that can be measured on the CPU"
        )
    console.print(line, soft_wrap=True)


def print_results(console: Console, folder: Path, rows: dict[str, tuple[Pictures, Pictures]]) -> None:
    """A small table of mean rewards (and of their parts) before and after, and where to look."""
    table = Table("mean over", "", "before", "after", "change")
    for name, (before, after) in rows.items():
        values = {"reward": (before.mean_reward, after.mean_reward)}
        if len(after.mean_parts) > 1:
            values |= {part: (before.mean_parts[part], after.mean_parts[part]) for part in after.mean_parts}
        for label, (first, second) in values.items():
            where = f"{len(after.images)} pictures, {name}" if label == "reward" else ""
            table.add_row(where, label, f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}")
    console.print(table)
    console.print(f"pictures: {folder / 'before_after.png'}\ncurve:    {folder / 'reward.png'}", soft_wrap=True)
    console.print(f"adapters: {folder / 'pytorch_lora_weights.safetensors'}", soft_wrap=True)
    console.print(f"          {folder / 'kohya_lora_weights.safetensors'} for ComfyUI and others", soft_wrap=True)
