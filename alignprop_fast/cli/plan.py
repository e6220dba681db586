"""The command `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignprop_fast.cli import options as o
from alignprop_fast.cli import options_control as c
from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import DEFAULTS
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import check_writable, plain, quiet_libraries, run_errors, setup_errors

_ESTIMATE = "Estimate"
Model = Annotated[
    str,
    typer.Option(
        help="sd15 or sdxl: the published architecture, no weights needed; a folder in the diffusers format, of which "
        "the configuration files are enough; a Hub id (owner/name); or demo.",
        rich_help_panel="Model",
    ),
]
Resolution = Annotated[
    int | None,
    typer.Option(help="Height and width in pixels.", rich_help_panel="Sampling", show_default="the model's own", min=8),
]
MemoryBudget = Annotated[
    str,
    typer.Option(
        help="What tensors may take on the device in all, weights included, such as 24GiB; auto: all of the GPU's "
        "memory but what CUDA itself takes, with --measure what is free.",
        rich_help_panel="Device and memory",
    ),
]
GpuName = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help="GPU to plan for, which need not be here, such as 'RTX 4090' or 'A100 80GB'.",
        rich_help_panel="Device and memory",
        show_default="the one that is here",
    ),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Load the model with its weights and measure on the device that is here instead of estimating.",
        rich_help_panel=_ESTIMATE,
    ),
]
FromTable = Annotated[
    str | None,
    typer.Option(
        "--table", help="Plan from a cost table that --save-table wrote, without the model.", rich_help_panel=_ESTIMATE
    ),
]
SaveTable = Annotated[
    str | None, typer.Option(help="Write the cost table to this JSON file.", rich_help_panel="Output")
]
Json = Annotated[
    str | None, typer.Option("--json", help="Write the plan and its numbers to this file.", rich_help_panel="Output")
]


def plan(
    ctx: typer.Context,
    model: Model = DEFAULTS.model,
    model_config: o.ModelConfig = DEFAULTS.model_config,
    lora_rank: o.LoraRank = DEFAULTS.lora_rank,
    lora_targets: o.LoraTargetsChoice = o.LoraTargets.attention,
    base_dtype: o.BasePrecision = o.BaseDtype.auto,
    adapter_dtype: o.AdapterPrecision = o.AdapterDtype.fp32,
    reward: o.Reward = DEFAULTS.reward,
    reward_model: o.RewardModel = [],  # noqa: B006  # typer wants a list, and copies it
    allow_pickle: o.AllowPickle = DEFAULTS.allow_pickle,
    prompts: o.Prompts = DEFAULTS.prompts,
    negative_prompt: o.NegativePrompt = DEFAULTS.negative_prompt,
    num_inference_steps: o.InferenceSteps = DEFAULTS.num_inference_steps,
    guidance_scale: o.GuidanceScale = DEFAULTS.guidance_scale,
    true_cfg_scale: o.TrueCfgScale = DEFAULTS.true_cfg_scale,
    scheduler: o.SchedulerChoice = o.SchedulerName.auto,
    resolution: Resolution = None,
    height: o.Height = None,
    width: o.Width = None,
    batch_size: o.BatchSize = DEFAULTS.batch_size,
    optimizer: o.OptimizerChoice = o.OptimizerName.adamw,
    truncation: o.Truncation = DEFAULTS.truncation,
    kl_weight: c.KlWeight = DEFAULTS.kl_weight,
    watch_reward: c.WatchReward = DEFAULTS.watch_reward,
    watch_reward_model: c.WatchRewardModel = [],  # noqa: B006
    watch_prompts: c.WatchPrompts = DEFAULTS.watch_prompts,
    diversity_model: c.DiversityModel = DEFAULTS.diversity_model,
    mixed_precision: o.MixedPrecision = o.Precision.auto,
    memory_budget: MemoryBudget = DEFAULTS.memory_budget,
    cache_text: o.CacheText = DEFAULTS.cache_text,
    gpu: GpuName = None,
    host_memory: o.HostMemory = None,
    measure: Measure = False,
    table: FromTable = None,
    save_table: SaveTable = None,
    json: Json = None,
    output_dir: o.OutputDir = "alignprop-plan",
) -> None:
    """Say what fits a memory budget, and how fast a training step will be: without weights, and on any GPU.

    Takes the options of train. The budget holds for the worst case of --truncation, however many steps carry gradient;
    the time is given for the mean as well. Writes plan.png, memory over the training step, to --output-dir. Exit code 2
    and one line with the least budget where nothing fits.

    Estimates count every operator on tensors without data, and time it by the GPU's data sheet.

    **Examples**

    - `alignprop-fast plan --model sdxl --gpu "RTX 4090" --reward hpsv2 --batch-size 1`
    - `alignprop-fast plan --model sd15 --gpu "RTX 3060" --memory-budget 10GiB --truncation last:1 --json plan.json`
    """
    console, folder = make_console(), ctx.with_resource(OutputFolder(output_dir))
    options = {name: plain(value) for name, value in ctx.params.items()}
    with setup_errors():
        from alignprop_fast.cli.plan_question import from_model, from_table
        from alignprop_fast.cli.plan_summary import print_prediction, write_json
        from alignprop_fast.planner import save_table as write_table
        from alignprop_fast.report.plan import plot_plan

        files = [Path(name).expanduser() for name in (save_table, json) if name is not None]
        folder.check()
        for file in files:
            check_writable(file.parent)
        quiet_libraries(console)
        given = [name for name in options if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
        question = from_model(console, options) if table is None else from_table(options, given)
        prediction = question.predict()
    if question.note:
        console.print(question.note, soft_wrap=True)
    console.print(question.title, soft_wrap=True)
    print_prediction(console, prediction)
    folder.begin()
    with run_errors(folder.path, "start again"):
        plot_plan(folder.path / "plan.png", prediction.table, prediction.worst, question.title)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        if save_table is not None:
            write_table(prediction.table, Path(save_table).expanduser())
        if json is not None:
            write_json(Path(json).expanduser(), prediction, question.facts)
    console.print(f"picture: {folder.path / 'plan.png'}", soft_wrap=True)
