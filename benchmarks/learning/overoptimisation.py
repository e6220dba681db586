"""A run that hacks its reward, and the same run with early stopping, on the bundled model.

    python -m benchmarks.learning.overoptimisation --output-dir hacked

Both runs train for colorfulness, which ignores the prompt, with the settings of `alignprop-fast demo` and the same
seed. Both watch clip on prompts that no run trains on. One runs to the end, the other has --patience and --max-drop.
The CSV has a line for each sampling. The plot shows both scores and the sample pictures: before training, at the step
that the stopped run went back to, and at the end.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from alignprop_fast.cli.demo import SETTINGS
from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.set_up import set_up
from alignprop_fast.cli.support import quiet_libraries
from alignprop_fast.report.style import BLUE, GREY, INK, ORANGE, RULE, save_figure
from alignprop_fast.training.options import TrainOptions
from benchmarks import RESULTS, ROOT
from benchmarks.rows import write_rows

PICTURES = 6


def train(name: str, options: TrainOptions, console: Console) -> list[dict[str, Any]]:
    """One run; a row for each sampling."""
    with OutputFolder(options.output_dir) as folder:
        session = set_up(options, console, folder)
        session.run()
    kept = session.trainer.steps_done if session.stopping is None else session.stopping.kept_step
    return [
        {
            "run": name,
            "step": record["step"],
            "reward": round(record["reward_mean"], 4),
            "watched": round(record["watch"]["reward"], 4),
            "diversity": round(record["watch"]["diversity"], 4),
            "kept_step": kept,
            "trained_on": options.reward,
            "watch": options.watch_reward,
            "patience": options.patience or "",
            "max_drop": options.max_drop,
            "kl_weight": options.kl_weight,
            "seed": options.seed,
            "versions": f"torch={version('torch')} diffusers={version('diffusers')}",
        }
        for record in session.records.samples.read()
    ]


def plot(rows: list[dict[str, str]], samples: Path, path: Path) -> None:
    """Plot the curves of the whole run, a line at the step that the stopped run went back to, and rows of pictures."""
    whole = [row for row in rows if row["run"] == "to the end"]
    kept = int(next(row for row in rows if row["run"] == "stopped")["kept_step"])
    ended = max(int(row["step"]) for row in rows if row["run"] == "stopped")
    steps = [int(row["step"]) for row in whole]
    figure = Figure(figsize=(9, 9.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.35])[:, 0]
    panels = top.subplots(1, 2)
    for panel, name, title, colour in (
        (panels[0], "reward", f"trained for: {whole[0]['trained_on']}", BLUE),
        (panels[1], "watched", f"watched: {whole[0]['watch']} on prompts never seen", ORANGE),
    ):
        panel.plot(steps, [float(row[name]) for row in whole], "o-", color=colour, ms=4, lw=1.6)
        panel.axvline(kept, color=INK, lw=1.2)
        panel.axvline(ended, color=GREY, lw=1.2, ls=":")
        panel.set_title(title, loc="left", color=INK, fontsize=11)
        panel.set_xlabel("optimizer step", color=INK)
        panel.grid(axis="y", color=RULE, lw=0.8)
        panel.tick_params(colors=GREY, labelcolor=INK, length=0)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    panels[0].text(kept, panels[0].get_ylim()[1], " kept", va="top", color=INK, fontsize=9)
    panels[0].text(ended, panels[0].get_ylim()[0], " stopped", va="bottom", color=GREY, fontsize=9)
    shown = ((0, "before"), (kept, f"kept: step {kept}"), (steps[-1], f"to the end: step {steps[-1]}"))
    grid = bottom.subplots(len(shown), PICTURES)
    for line, (step, label) in zip(grid, shown, strict=True):
        for i, panel in enumerate(line):
            panel.imshow(Image.open(samples / f"step_{step:04d}" / f"{i:02d}.png"), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            for spine in panel.spines.values():
                spine.set_visible(False)
        line[0].set_title(label, loc="left", color=INK, fontsize=11)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--reward", default="colorfulness")
    parser.add_argument("--watch-reward", default="clip")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--sample-every", type=int, default=3)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--max-drop", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu" / "overoptimisation.csv")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "pictures" / "overoptimisation.png")
    parser.add_argument("--plot", action="store_true", help="only draw the picture, from the CSV and --output-dir")
    args = parser.parse_args()
    if not args.plot:
        torch.set_num_threads(1)
        console = Console(highlight=False)
        quiet_libraries(console)
        options = replace(
            SETTINGS,
            reward=args.reward,
            watch_reward=args.watch_reward,
            steps=args.steps,
            sample_every=args.sample_every,
            save_every=args.sample_every,
            seed=args.seed,
        )
        runs = {"to the end": options, "stopped": replace(options, patience=args.patience, max_drop=args.max_drop)}
        rows = []
        for name, run in runs.items():
            rows += train(name, replace(run, output_dir=str(args.output_dir / name.replace(" ", "_"))), console)
        write_rows(args.csv, rows)
    with open(args.csv, newline="", encoding="utf-8") as file:
        plot(list(csv.DictReader(file)), args.output_dir / "to_the_end" / "samples", args.png)


if __name__ == "__main__":
    main()
