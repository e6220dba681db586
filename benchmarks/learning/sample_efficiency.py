"""The number of pictures that must be scored: AlignProp beside DDPO and one-step truncation, on the bundled model.

    python -m venv trl-env
    trl-env/bin/pip install trl==0.23.1 transformers==4.56.2 diffusers==0.35.2 peft==0.17.1 torch
    trl-env/bin/pip install --no-deps .
    python -m benchmarks.learning.sample_efficiency --trl-python trl-env/bin/python --runs sample_efficiency_runs
    python -m benchmarks.learning.sample_efficiency --trl-python trl-env/bin/python --runs sweep_runs --sweep
    python -m benchmarks.learning.sample_efficiency --plot-only

- `ddpo`: trl 0.23.1's own DDPOTrainer (Black et al. 2023), in its own environment.
- `alignprop`: our AlignPropTrainer, truncation `uniform` (Prabhudesai et al. 2023).
- `one step`: the same with truncation `last:1` (DRaFT-1, Clark et al. 2024).

All three train LoRA adapters of rank 4 on the attention projections of the same model with the same reward and the same
8 prompts, in 12 steps with guidance 2 and eta 1, in fp32 on one thread. A query is one picture scored in training. From
time to time a run is evaluated: the mean reward of 32 pictures of these prompts, with other seeds, and of 16 pictures
of prompts never trained on. Evaluation counts as no query and no time. Seconds are CPU seconds of the trainer's own
steps.

DDPO draws 64 pictures per epoch and takes advantages per prompt, as in trl's example. `--sweep` searches its other
settings on runs of 128 pictures: learning rates from 1e-3 to 1e-2, one and two inner epochs, updates of 16 and 32
pictures, clip ranges 1e-4 (the paper's) and 1e-3. The paper's range clips more here than in the paper: the log
probability is a mean over the numbers of a latent, 2,048 here and 16,384 in Stable Diffusion, so ratios vary more.
AlignProp and one step
have the learning rate of `alignprop-fast demo`; it was not searched for.

Runs are kept in a folder, so that the command continues where it was cut off. `--collect` uses the results so far.
`--plot-only` draws the CSV again and prints its summary.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.rows import write_rows

WORKER = Path(__file__).with_name("sample_efficiency_worker.py")
COLUMNS = [
    *("method", "seed", "queries", "cpu_seconds", "wall_seconds", "reward", "heldout_reward"),
    *("learning_rate", "inner_epochs", "update_pictures", "clip_range", "versions"),
]
AXES = {"queries": "reward queries", "cpu_seconds": "CPU seconds of training"}
REWARDS = {"reward": "training prompts", "heldout_reward": "prompts never seen"}


@dataclass(frozen=True)
class Settings:
    """Settings of one method's run, and the numbers of queries after which it is evaluated; the last ends it."""

    truncation: str  # "ddpo" if there is none
    learning_rate: float
    evaluate_at: tuple[int, ...]
    inner_epochs: int = 1
    update_pictures: int = 4
    clip_range: float = 1e-4  # of ddpo


DDPO_AT = (128, 256, 384, 512)
OURS_AT = (8, 16, 24, 32, 48, 64, 96, 128)
METHODS = {
    "ddpo": Settings("ddpo", 3e-3, DDPO_AT, update_pictures=32),  # the best of `SWEEP`
    "alignprop": Settings("uniform", 2e-3, OURS_AT),
    "one step": Settings("last:1", 2e-3, OURS_AT),
}
# Settings and seeds in the order in which they were tried. No reported run has seed 100.
SWEEP = (
    (Settings("ddpo", 3e-3, (128,), update_pictures=16, clip_range=1e-3), (100,)),
    (Settings("ddpo", 1e-2, (128,), update_pictures=16, clip_range=1e-3), (100,)),
    (Settings("ddpo", 1e-3, (128,), update_pictures=16, clip_range=1e-3), (100,)),
    (Settings("ddpo", 3e-3, (128,), update_pictures=32), (100,)),
    (Settings("ddpo", 1e-2, (128,), inner_epochs=2, update_pictures=16), (100,)),
)

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="python of an environment with trl 0.23.1 and this package")
    parser.add_argument("--runs", type=Path, default=Path("sample_efficiency_runs"), help="folder of the runs' files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--reward", default="colorfulness")
    parser.add_argument("--sweep", action="store_true", help="the search for settings instead of the comparison")
    parser.add_argument("--collect", action="store_true", help="run nothing, use the results in the folder of runs")
    parser.add_argument("--plot-only", action="store_true", help="only draw the existing CSV")
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu", help="folder of the CSV files")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "pictures" / "sample_efficiency.png")
    args = parser.parse_args()
    if args.trl_python is None and not (args.plot_only or args.collect):
        parser.error("give --trl-python, or --plot-only")
    return args


def run(args: argparse.Namespace, method: str, settings: Settings, seed: int) -> list[Row]:
    """Run one run, or the rest of it, in its own process; returns its rows."""
    numbers = (settings.learning_rate, settings.inner_epochs, settings.update_pictures, settings.clip_range)
    name = "_".join([method.replace(" ", "_"), *(f"{number:g}" for number in numbers), f"seed{seed}"])
    output = args.runs.resolve() / f"{name}.jsonl"
    options = {
        "method": settings.truncation,
        "seed": seed,
        "learning-rate": settings.learning_rate,
        "inner-epochs": settings.inner_epochs,
        "update-pictures": settings.update_pictures,
        "clip-range": settings.clip_range,
        "reward": args.reward,
        "output": output,
    }
    python = args.trl_python if settings.truncation == "ddpo" else sys.executable
    command = [str(python), str(WORKER)]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command += ["--evaluate-at", *map(str, settings.evaluate_at)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    if not args.collect:
        ended = subprocess.run(command, env={**os.environ, **quiet}, stderr=subprocess.PIPE, text=True)
        if ended.returncode:
            raise SystemExit(f"{method}, seed {seed} failed:\n{ended.stderr[-3000:]}")
    if not output.exists():
        return []
    same = {
        **{"method": method, "seed": seed, "learning_rate": settings.learning_rate},
        **{"inner_epochs": settings.inner_epochs, "update_pictures": settings.update_pictures},
        "clip_range": settings.clip_range,
    }
    return [{**json.loads(line), **same} for line in output.read_text(encoding="utf-8").splitlines()]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The columns of the table; runs record more than those."""
    write_rows(path, [{name: row.get(name, "") for name in COLUMNS} for row in rows], COLUMNS)


def read_csv(path: Path) -> list[Row]:
    """The rows, with numbers as numbers."""
    with open(path, encoding="utf-8") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for column in COLUMNS:
            if column not in ("method", "versions"):
                row[column] = float(row[column])
    return rows


def curves(rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """By method, one list of rows per seed, in the order of queries."""
    grouped: dict[str, dict[float, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row["queries"]):
        grouped.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
    return {method: list(seeds.values()) for method, seeds in grouped.items()}


def needed(curve: Sequence[Row], reward: float, axis: str = "queries") -> float | None:
    """Queries (or seconds) after which a run first reaches `reward`, linear between evaluations; None: never."""
    if curve[0]["reward"] >= reward:
        return curve[0][axis]
    for low, high in pairwise(curve):
        if high["reward"] >= reward:
            share = (reward - low["reward"]) / (high["reward"] - low["reward"])
            return low[axis] + share * (high[axis] - low[axis])
    return None


def summary(rows: Sequence[Row]) -> list[str]:
    """Lines that sum up the CSV: the best that DDPO reached, and the queries that the others took to reach it."""
    methods = curves(rows)
    lines = []
    for method, seeds in methods.items():
        ends, queries = ([curve[-1][key] for curve in seeds] for key in ("reward", "queries"))
        length = f"{min(queries):.0f}" if min(queries) == max(queries) else f"{min(queries):.0f} to {max(queries):.0f}"
        lines.append(
            f"{method}: {seeds[0][0]['reward']:.4f} at the start, {mean(ends):.4f} ({min(ends):.4f} to {max(ends):.4f})"
            f" after {length} queries, {mean(curve[-1]['cpu_seconds'] for curve in seeds):.0f} s"
        )
    if "ddpo" not in methods:
        return lines
    budget = min(curve[-1]["queries"] for curve in methods["ddpo"])
    best = [max(row["reward"] for row in curve) for curve in methods["ddpo"]]
    for name, reward in (("mean over the seeds", mean(best)), ("best seed", max(best))):
        for method in (method for method in methods if method != "ddpo"):
            taken = [needed(curve, reward) for curve in methods[method]]
            reached = [value for value in taken if value is not None]
            text = f"DDPO's best, {name}: {reward:.4f}; {method} reaches it"
            if len(reached) < len(taken):
                lines.append(f"{text} in {len(reached)} of {len(taken)} runs")
                continue
            taken_text = f"{mean(reached):.1f} ({min(reached):.1f} to {max(reached):.1f}) queries of {budget:.0f}"
            share = f": 1/{budget / max(reached):.0f} in the slowest run" if max(reached) else ""
            lines.append(f"{text} after {taken_text}{share}")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot the mean reward over the seeds against queries and seconds, as far as all seeds got.

    A band shows the lowest to the highest, and thin lines show each seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 7), sharey="row", constrained_layout=True)
    for method, seeds in curves(rows).items():
        steps = list(zip(*seeds, strict=False))[1:]  # the axis is logarithmic and has no zero
        for across, axis in enumerate(AXES):
            for down, reward in enumerate(REWARDS):
                values = [[row[reward] for row in step] for step in steps]
                at = [mean(row[axis] for row in step) for step in steps]
                (line,) = panels[down, across].plot(at, [mean(v) for v in values], ".-", markersize=4, label=method)
                low, high = [min(v) for v in values], [max(v) for v in values]
                panels[down, across].fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
                for curve in seeds:
                    own = [row[axis] for row in curve[1:]], [row[reward] for row in curve[1:]]
                    panels[down, across].plot(*own, color=line.get_color(), linewidth=0.6, alpha=0.7)
    for across, label in enumerate(AXES.values()):
        for down, (reward, title) in enumerate(REWARDS.items()):
            panel = panels[down, across]
            panel.axhline(rows[0][reward], color="gray", linewidth=0.8, linestyle=":")
            panel.set(xscale="log", xlabel=label, title=title)
            panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("mean reward")
    panels[0, 0].legend()
    count = max(len(seeds) for seeds in curves(rows).values())
    figure.suptitle(f"Bundled model, {count} seeds: mean, lowest to highest, and each; dotted: before training")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(args: argparse.Namespace, path: Path) -> None:
    """All runs, seed by seed, so that an unfinished comparison has complete seeds; the CSV is written after each."""
    rows: list[Row] = []
    for seed in range(args.seeds):
        for method in args.methods:
            rows += run(args, method, METHODS[method], seed)
            write_csv(path, rows)


def sweep(args: argparse.Namespace, path: Path) -> None:
    rows: list[Row] = []
    for settings, seeds in SWEEP:
        for seed in seeds:
            rows += run(args, settings.truncation, settings, seed)
            write_csv(path, rows)


def main() -> None:
    args = parse()
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.sweep:
        sweep(args, args.results / "sample_efficiency_sweep.csv")
        return
    path = args.results / "sample_efficiency.csv"
    if not args.plot_only:
        compare(args, path)
    rows = read_csv(path)
    if not any(row["queries"] for row in rows):
        raise SystemExit(f"{path} has no run that was judged after training: let one go on first")
    draw(rows, args.plot)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
