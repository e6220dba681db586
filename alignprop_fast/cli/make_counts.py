"""Makes the counts that the package ships, so that a plan of a built-in model answers in seconds.

    python -m alignprop_fast.cli.make_counts

They hold under default options and the ranks that people use, for batch sizes 1, 2 and 4 (whose plans need them), on
every GPU, with every published reward. Run it after a change of what a step runs or of the versions in
`constraints.txt`: a test says when.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from alignprop_fast.cli.counting import Counting
from alignprop_fast.cli.kept_counts import SHIPPED, Part, archive
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.parts import resolved
from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.files import write_whole
from alignprop_fast.planner import GPUS, as_text

BATCHES = (1, 2, 4)
RANKS = (4, 8, 16, 32, 64)
Size = tuple[int, int]
REWARDS = ("clip", "hpsv2", "pickscore", "imagereward", "aesthetic")


def counting_of(model: str, rank: int = RANKS[0], reward: str = "hpsv2") -> Counting:
    """The counting of `plan --model MODEL --lora-rank RANK --reward REWARD`."""
    options = resolved(PlanOptions(model=model, lora_rank=rank, reward=reward), "bf16")
    return Counting(Console(quiet=True), options, make_config(options, "meta", ""), GPUS[0])


def parts_of_model(counting: Counting) -> list[Part]:
    return [Part.model(counting.options, batch) for batch in BATCHES]


def parts_of_reward(counting: Counting, size: tuple[int, int]) -> list[Part]:
    return [Part.reward(counting.options, batch, size) for batch in BATCHES]


def make_model(model: str) -> tuple[str, set[Size]]:
    """Write the counts of a model. Returns what to print, and the sizes of its pictures (height, width)."""
    made, sizes = dict[str, str](), set[Size]()
    for rank in RANKS:
        counting = counting_of(model, rank)
        for part in parts_of_model(counting):
            counted = counting.count_model(part)
            made[part.key] = as_text(counted)
            sizes.add((int(counted.costs.origin["height"]), int(counted.costs.origin["width"])))
    return _write(part.shipped_in, made), sizes


def make_rewards(sizes: Iterable[Size]) -> str:
    """Write the counts of the rewards for pictures of these sizes. Returns what to print."""
    made = dict[str, str]()
    for reward in REWARDS:
        counting = counting_of("sdxl", reward=reward)
        for size in sorted(sizes):
            for part in parts_of_reward(counting, size):
                made[part.key] = as_text(counting.count_reward(part))
    return _write(part.shipped_in, made)


def _write(path: Path, texts: dict[str, str]) -> str:
    write_whole(path, archive(texts))
    return f"{path.name}: {path.stat().st_size / 1000:.0f} kB"


def main() -> None:
    from alignprop_fast.models.architectures import NAMES

    SHIPPED.mkdir(exist_ok=True)
    for path in SHIPPED.iterdir():
        path.unlink()  # what is counted now must not take anything from them
    sizes = set[Size]()
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for line, own in pool.map(make_model, NAMES):
            print(line, flush=True)
            sizes |= own
    print(make_rewards(sizes))


if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"  # one model on each core
    main()
