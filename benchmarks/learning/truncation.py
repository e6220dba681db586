"""Compares the truncation rules on the bundled models: what each learns in equal CPU seconds and equal reward queries.

    python -m benchmarks.learning.truncation          runs what the CSV lacks, draws the plots
    python -m benchmarks.learning.truncation --plot   draws the plots again from the CSV, and prints a table

Every rule trains adapters on one reward with the settings of `alignprop-fast demo` but for the chain, which has no
noise, and the reward, three times with other seeds. Scores are of prompts that no run trains on, two pictures each with
other seeds: the trained reward, a watched one that is not trained for, and the diversity, the mean CLIP distance of the
two. Seconds are CPU seconds of one thread without scoring, so that other work on the machine does not count. Each run
of a chain, a rule and a seed is added to the CSV when it ends.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignprop_fast.cli.demo import HELDOUT_SEED
from alignprop_fast.cli.demo import SETTINGS as DEMO
from alignprop_fast.cli.options import make_config
from alignprop_fast.evaluation.evaluate import BASE, DIVERSITY, REWARD, Evaluation, draw, tasks_of
from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.prompts.rows import load_prompts, load_rows, spread
from alignprop_fast.report.style import GREY, INK, RULE, save_figure
from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.diversity import ImageEmbedder
from alignprop_fast.training.trainer import AlignPropTrainer
from benchmarks import RESULTS, ROOT
from benchmarks.learning.chains import RULES, SETTINGS
from benchmarks.rows import KeptRows

PROMPTS = 12  # held-out prompts to score
SECONDS = {"demo-12": 20.0, "unguided-12": 20.0, "demo-50": 80.0, "twin-4": 8.0}  # of training
SCORES = ("score", "watched_score", "diversity")
AXES = (("seconds", "score"), ("reward_queries", "score"), ("score", "watched_score"), ("score", "diversity"))
Rows = Sequence[Mapping[str, str]]


class Scorer:
    """Trained and watched reward and diversity of the held-out prompts with the current adapters."""

    def __init__(self, reward: str, watched: str, prompts: str) -> None:
        self.tasks = tasks_of("held out", spread(load_rows(f"{prompts}-heldout"), PROMPTS), 2, HELDOUT_SEED)
        self.reward, self.watched, self.embed = get_reward(reward), get_reward(watched), ImageEmbedder()

    def __call__(self, trainer: AlignPropTrainer) -> dict[str, float]:
        trained, watched = Evaluation(self.reward, (), self.embed), Evaluation(self.watched)
        size, prompts, seeds = DEMO.batch_size, [t.prompt for t in self.tasks], [t.seed for t in self.tasks]
        for i, images in enumerate(draw(trainer.sampler, prompts, seeds, size)):
            for evaluation in (trained, watched):
                evaluation.add(BASE, self.tasks[i * size : (i + 1) * size], images)
        found = {summary.part: summary.mean for summary in trained.summaries()}
        scores = (found[REWARD], watched.summaries()[0].mean, found[DIVERSITY])
        return {name: round(score, 4) for name, score in zip(SCORES, scores, strict=True)}


class Curves:
    """Runs of one chain."""

    def __init__(self, chain: str, args: argparse.Namespace) -> None:
        self.chain, self.args, self.setting = chain, args, SETTINGS[chain]
        self.seconds = args.seconds or SECONDS[chain]
        self.scorer = Scorer(args.reward, args.watch, args.prompts)
        self.prompts = load_prompts(args.prompts)
        self.before: dict[str, float] = {}  # scores of the model without adapters, which is where every run starts

    def trainer(self, rule: str, seed: int, folder: str) -> AlignPropTrainer:
        options = replace(
            DEMO,
            model=self.setting.model,
            reward=self.args.reward,
            num_inference_steps=self.setting.steps,
            guidance_scale=self.setting.guidance_scale,
            eta=0.0,
            truncation=rule,
            seed=seed,
            steps=10**6,
            save_every=10**6,
            output_dir=folder,
            lora_alpha=float(DEMO.lora_rank),
            mixed_precision="no",
        )
        pipeline = DefaultDDPOStableDiffusionPipeline(self.setting.model)
        return AlignPropTrainer(make_config(options, "cpu", ""), self.scorer.reward, self._prompt, pipeline)

    def _prompt(self) -> tuple[str, dict[str, Any]]:
        return random.choice(self.prompts), {}

    def run(self, rule: str, seed: int) -> list[dict[str, Any]]:
        """Train under one rule; returns rows at the start and after equal shares of the seconds."""
        with tempfile.TemporaryDirectory() as folder:
            trainer, used, queries = self.trainer(rule, seed, folder), 0.0, 0
            self.before = self.before or self.scorer(trainer)
            known = {"chain": self.chain, "rule": rule, "seed": seed}
            rows = [known | {"seconds": 0.0, "optimizer_steps": 0, "reward_queries": 0} | self.before]
            for mark in range(1, self.args.marks + 1):
                while used < self.seconds * mark / self.args.marks:
                    begin = time.process_time()
                    trainer.step(trainer.steps_done, trainer.global_step)
                    used += time.process_time() - begin
                    assert trainer.sampler.truncation is not None
                    queries += DEMO.batch_size * (1 + len(trainer.sampler.truncation.renoise_steps))
                done = {"seconds": round(used, 1), "optimizer_steps": trainer.steps_done, "reward_queries": queries}
                rows.append(known | done | self.scorer(trainer))
                print(rows[-1], flush=True)
        told = {"reward": self.args.reward, "watched": self.args.watch, "pictures": len(self.scorer.tasks)}
        return [
            {**row, **told, "versions": f"torch={version('torch')} diffusers={version('diffusers')}"} for row in rows
        ]


def at(rows: Rows, axis: str, place: float, name: str) -> float:
    """The column `name` of one run where `axis` has that value, between two marks on a straight line."""
    return float(np.interp(place, [float(row[axis]) for row in rows], [float(row[name]) for row in rows]))


def runs_of(rows: Rows) -> dict[str, list[Rows]]:
    """The runs of one chain by rule, one for each seed."""
    found: dict[str, dict[str, list[Mapping[str, str]]]] = {}
    for row in rows:
        found.setdefault(row["rule"], {}).setdefault(row["seed"], []).append(row)
    return {rule: list(runs.values()) for rule, runs in found.items()}


def summary(rows: Rows) -> list[str]:
    """A markdown table of one chain: at its last second, and at the reward queries that every run has made."""
    runs = runs_of(rows)
    every = [run for of_rule in runs.values() for run in of_rule]
    seconds, queries = (min(float(run[-1][axis]) for run in every) for axis in ("seconds", "reward_queries"))
    names = ("score", "watched", "diversity")
    head = [
        "rule",
        "runs",
        "optimizer steps",
        *(f"{name}, {seconds:.0f} s" for name in names),
        f"score, {queries:.0f} queries",
    ]
    lines = [head, ["---"] * len(head)]
    for rule, of_rule in runs.items():
        steps = fmean(float(run[-1]["optimizer_steps"]) for run in of_rule)
        asked = [*(("seconds", seconds, name) for name in SCORES), ("reward_queries", queries, "score")]
        cells = [_with_error([at(run, *place) for run in of_rule]) for place in asked]
        lines.append([f"`{rule}`", str(len(of_rule)), f"{steps:.0f}", *cells])
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _with_error(values: Sequence[float]) -> str:
    """The mean in three digits, and its standard error if there are several values."""
    error = f" ({stdev(values) / len(values) ** 0.5:.2g})" if len(values) > 1 else ""
    return f"{fmean(values):.3g}{error}"


def plot(rows: Rows, axes: Sequence[tuple[str, str]], path: Path) -> None:
    """A row of panels for each chain, with one line per rule: the mean over seeds at each mark."""
    chains = list(dict.fromkeys(row["chain"] for row in rows))
    figure = Figure(figsize=(5 * len(axes) + 1.6, 3.8 * len(chains)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(chains), len(axes), squeeze=False)
    for panels, chain in zip(grid, chains, strict=True):
        mine = [row for row in rows if row["chain"] == chain]
        for panel, (x, y) in zip(panels, axes, strict=True):
            _plot_lines(panel, runs_of(mine), x, y)
        panels[0].set_title(
            f"{chain}: {mine[0]['reward']}, watched {mine[0]['watched']}", loc="left", color=INK, fontsize=10
        )
    lines = {line.get_label(): line for panel in grid[:, 0] for line in panel.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False, fontsize=8, labelcolor=INK)
    save_figure(figure, path)


def _plot_lines(panel: Axes, runs: Mapping[str, list[Rows]], x: str, y: str) -> None:
    for rule, of_rule in runs.items():
        index = RULES.index(rule) if rule in RULES else len(RULES)
        xs, ys = ([fmean(float(row[name]) for row in marks) for marks in zip(*of_rule, strict=True)] for name in (x, y))
        panel.plot(xs, ys, "os^"[index % 3] + "-", color=colormaps["tab10"](index % 10), ms=3.5, lw=1.2, label=rule)
    panel.set_xlabel(x.replace("_", " "), color=INK)
    panel.set_ylabel(y.replace("_", " "), color=INK)
    panel.grid(color=RULE, lw=0.8)
    panel.tick_params(colors=GREY, labelcolor=INK, length=0)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", nargs="+", choices=SECONDS, default=("demo-12", "twin-4"))
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, help="CPU seconds of training per run, instead of the chain's own")
    parser.add_argument("--marks", type=int, default=2, help="how many times to score during training")
    parser.add_argument("--reward", default="colorfulness", help="trained")
    parser.add_argument("--watch", default="clip", help="watched, not trained for")
    parser.add_argument("--prompts", choices=("demo", "same-colour"), default="demo", help="each has held-out ones")
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu" / "truncation.csv")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "pictures" / "truncation.png", help="curves")
    parser.add_argument("--kept-png", type=Path, default=ROOT / "docs" / "pictures" / "truncation_kept.png")
    parser.add_argument("--plot", action="store_true", help="only draw the plots from the CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = KeptRows(args.csv, ("chain", "rule", "seed"))
    if not args.plot:
        kept.check(reward=args.reward, watched=args.watch)
    for chain in () if args.plot else args.chains:
        curves = Curves(chain, args)
        for seed in args.seeds:  # first one seed of every rule: then all rules meet the same load of the machine
            for rule in args.rules:
                if not kept.has(chain, rule, seed):
                    kept.add(curves.run(rule, seed))
    rows = kept.read()
    plot(rows, AXES[:2], args.png)
    plot(rows, AXES[2:], args.kept_png)
    for chain in dict.fromkeys(row["chain"] for row in rows):
        print(chain, *summary([row for row in rows if row["chain"] == chain]), sep="\n")


if __name__ == "__main__":
    main()
