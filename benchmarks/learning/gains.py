"""The gain of each reward: before and after fine-tuning the bundled model, on training prompts and on others.

    python -m benchmarks.learning.gains --output-dir learning

Every run has the settings of `alignprop-fast demo`. The scored pictures have seeds that training never drew. A row has
their mean with its standard error, and how many of them gained. Every picture gets the scores of all rewards, so the
table also shows the effect of one reward on the others. The folders keep each run's before_after.png.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from alignprop_fast.cli.demo import HELDOUT_PROMPTS, HELDOUT_SEED, SETTINGS
from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.session import Session
from alignprop_fast.cli.set_up import set_up
from alignprop_fast.cli.support import quiet_libraries
from alignprop_fast.evaluation.evaluate import draw, score
from alignprop_fast.prompts.rows import PromptRow, load_prompts
from alignprop_fast.rewards import get_reward
from benchmarks import RESULTS
from benchmarks.rows import write_rows

REWARDS = (
    SETTINGS.reward,
    "clip",
    "compressibility",
    "incompressibility",
    "colorfulness",
    "clip:1.0,compressibility:0.3",
)
SCORED = ("clip", "compressibility", "colorfulness")


def scores_of(session: Session, prompts: list[str], scorers: dict[str, Any]) -> dict[str, list[float]]:
    """Scores of every scorer on one picture per prompt, with the current adapters."""
    scores: dict[str, list[float]] = {name: [] for name in scorers}
    seeds = range(HELDOUT_SEED, HELDOUT_SEED + len(prompts))
    rows = iter([PromptRow(prompt) for prompt in prompts])
    for images in draw(session.trainer.sampler, prompts, seeds, session.options.batch_size):
        batch = list(islice(rows, len(images)))
        for name, scorer in scorers.items():
            scores[name] += score(scorer, images, batch)[0].tolist()
    return scores


def run(reward: str, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Fine-tune on one reward and return its rows of the table."""
    folder = args.output_dir / reward.replace(":", "-").replace(",", "_")
    options = replace(SETTINGS, reward=reward, steps=args.steps, seed=args.seed, output_dir=str(folder))
    with OutputFolder(folder) as taken:
        session = set_up(options, console, taken)
        scorers: dict[str, Any] = {name: get_reward(name) for name in SCORED}
        sets = {"trained": session.prompts, "never seen": load_prompts(HELDOUT_PROMPTS)}
        before = {name: scores_of(session, prompts, scorers) for name, prompts in sets.items()}
        begin = time.perf_counter()
        session.run()
        seconds = time.perf_counter() - begin
    rows = []
    for name, prompts in sets.items():
        after = scores_of(session, prompts, scorers)
        for scored in SCORED:
            gains = [b - a for a, b in zip(before[name][scored], after[scored], strict=True)]
            rows.append(
                {
                    "trained_on": reward,
                    "scored_by": scored,
                    "prompts": name,
                    "pictures": len(gains),
                    "before": round(mean(before[name][scored]), 4),
                    "after": round(mean(after[scored]), 4),
                    "gain": round(mean(gains), 4),
                    "standard_error": round(stdev(gains) / len(gains) ** 0.5, 4),
                    "share_that_gained": round(sum(gain > 0 for gain in gains) / len(gains), 3),
                    "optimizer_steps": options.steps,
                    "seconds": round(seconds, 1),
                    "seed": args.seed,
                    "versions": f"torch={version('torch')} diffusers={version('diffusers')}",
                    "device": platform.machine(),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=REWARDS)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="optimizer steps of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the runs; must be new")
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu" / "learning.csv")
    args = parser.parse_args()
    console = Console(highlight=False)
    quiet_libraries(console)
    rows: list[dict[str, Any]] = []
    for reward in args.rewards:
        rows += run(reward, args, console)
        for row in rows[-2 * len(SCORED) :]:
            console.print({key: row[key] for key in ("trained_on", "scored_by", "prompts", "before", "after")})
    write_rows(args.csv, rows)


if __name__ == "__main__":
    main()
