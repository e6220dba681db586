"""Compares the truncation rules on the bundled model: reward and diversity per second and per reward query.

    python -m benchmarks.learning.truncation          trains once under each rule, writes the CSV and the plot
    python -m benchmarks.learning.truncation --plot   draws the plot again from the CSV

Every rule has the settings of `alignprop-fast demo` (clip, its learning rate, its prompts, one seed) and the same
seconds of training. The scores are of prompts that no run trains on, two pictures each with other seeds. The diversity
is the mean CLIP distance of the two. Seconds are CPU seconds of one thread without scoring, so that other work on the
machine does not count.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignprop_fast.cli.demo import HELDOUT_SEED, SETTINGS
from alignprop_fast.cli.options import make_config
from alignprop_fast.evaluation.evaluate import BASE, DIVERSITY, REWARD, Evaluation, draw, tasks_of
from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.prompts.rows import load_prompts, load_rows
from alignprop_fast.report.style import GREY, INK, RULE, save_figure
from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.diversity import ImageEmbedder
from alignprop_fast.training.trainer import AlignPropTrainer
from benchmarks import RESULTS, ROOT
from benchmarks.rows import write_rows

RULES = ("full", "uniform", "uniform-once", "gaussian", "last:4", "last:1", "lv:2", "drtune", "refl")
PROMPTS = 12  # held-out prompts to score
COLOURS = ("#2f6fde", "#e07b27", "#2f9e62", "#b8336a", "#7a5cc2", "#1d2430", "#00a0b0", "#c2a000", "#8a6a4f")


class Scorer:
    """Mean reward and diversity of the held-out prompts with the current adapters."""

    def __init__(self, reward: Any) -> None:
        rows = load_rows("demo-heldout")
        chosen = [rows[i * len(rows) // PROMPTS] for i in range(PROMPTS)]
        self.tasks = tasks_of("held out", chosen, 2, HELDOUT_SEED)
        self.reward, self.embed = reward, ImageEmbedder()

    def __call__(self, trainer: AlignPropTrainer) -> dict[str, float]:
        evaluation, size = Evaluation(self.reward, (), self.embed), SETTINGS.batch_size
        prompts, seeds = [task.prompt for task in self.tasks], [task.seed for task in self.tasks]
        for i, images in enumerate(draw(trainer.sampler, prompts, seeds, size)):
            evaluation.add(BASE, self.tasks[i * size : (i + 1) * size], images)
        found = {summary.part: summary for summary in evaluation.summaries()}
        return {
            "reward": round(found[REWARD].mean, 4),
            "reward_standard_error": round(found[REWARD].standard_error, 4),
            "diversity": round(found[DIVERSITY].mean, 4),
        }


def run(rule: str, seconds: float, marks: int, reward: Any, scorer: Scorer, seed: int) -> list[dict[str, Any]]:
    """Train under one rule; returns rows at the start and after each of `marks` equal shares of the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        options = replace(
            SETTINGS, truncation=rule, steps=10**6, save_every=10**6, seed=seed, output_dir=folder, lora_alpha=8.0
        )
        options = replace(options, mixed_precision="no")
        prompts = load_prompts(options.prompts)
        trainer = AlignPropTrainer(
            make_config(options, "cpu", ""),
            reward,
            lambda: (random.choice(prompts), {}),
            DefaultDDPOStableDiffusionPipeline("demo"),
        )
        used, queries = 0.0, 0
        rows = [{"truncation": rule, "seconds": 0.0, "optimizer_steps": 0, "reward_queries": 0, **scorer(trainer)}]
        for mark in range(1, marks + 1):
            while used < seconds * mark / marks:
                begin = time.process_time()
                trainer.step(trainer.steps_done, trainer.global_step)
                used += time.process_time() - begin
                assert trainer.sampler.truncation is not None
                queries += options.batch_size * (1 + len(trainer.sampler.truncation.renoise_steps))
            done = {"seconds": round(used, 1), "optimizer_steps": trainer.steps_done, "reward_queries": queries}
            rows.append({"truncation": rule, **done, **scorer(trainer)})
            print(rows[-1], flush=True)
    versions = f"torch={version('torch')} diffusers={version('diffusers')}"
    return [{**row, "pictures": len(scorer.tasks), "seed": seed, "versions": versions} for row in rows]


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Plot reward over seconds and over queries, and diversity over reward, with one line per rule."""
    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    axes = (("seconds", "reward"), ("reward_queries", "reward"), ("reward", "diversity"))
    for panel, (x, y) in zip(panels, axes, strict=True):
        for colour, rule in zip(COLOURS, dict.fromkeys(row["truncation"] for row in rows), strict=False):
            mine = [row for row in rows if row["truncation"] == rule]
            xs, ys = ([float(row[name]) for row in mine] for name in (x, y))
            panel.plot(xs, ys, "o-", color=colour, ms=3.5, lw=1.4, label=rule)
        panel.set_xlabel(x.replace("_", " "), color=INK)
        panel.set_ylabel(y, color=INK)
        panel.grid(color=RULE, lw=0.8)
        panel.tick_params(colors=GREY, labelcolor=INK, length=0)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    panels[0].set_title("clip on prompts never trained on", loc="left", color=INK, fontsize=10)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--seconds", type=float, default=45, help="CPU seconds of training per rule")
    parser.add_argument("--marks", type=int, default=3, help="how many times to score during training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu" / "truncation.csv")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "pictures" / "truncation.png")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the CSV")
    args = parser.parse_args()
    if not args.plot:
        torch.set_num_threads(1)
        reward = get_reward(SETTINGS.reward)
        scorer = Scorer(reward)
        rows = [row for rule in args.rules for row in run(rule, args.seconds, args.marks, reward, scorer, args.seed)]
        write_rows(args.csv, rows)
    with open(args.csv, newline="", encoding="utf-8") as file:
        plot(list(csv.DictReader(file)), args.png)


if __name__ == "__main__":
    main()
