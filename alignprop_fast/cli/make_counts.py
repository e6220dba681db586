"""Makes the counts that the package ships, so that a plan of a built-in model answers in seconds.

    python -m alignprop_fast.cli.make_counts

They hold under default options and the ranks that people use, for batch sizes 1, 2 and 4 (whose plans need them), on
every GPU, with every published reward. Run it after a change of what a step runs or of the versions in
`constraints.txt`: a test says when.
"""

from __future__ import annotations

import os
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
REWARDS = ("clip", "hpsv2", "pickscore", "imagereward", "aesthetic")


def counting_of(model: str, rank: int = RANKS[0], reward: str = "hpsv2") -> Counting:
    """The counting of `plan --model MODEL --lora-rank RANK --reward REWARD`."""
    options = resolved(PlanOptions(model=model, lora_rank=rank, reward=reward), "bf16")
    return Counting(Console(quiet=True), options, make_config(options, "meta", ""), GPUS[0])


def parts_of_model(counting: Counting) -> list[Part]:
    return [Part.model(counting.options, batch) for batch in BATCHES]


def parts_of_reward(counting: Counting, size: tuple[int, int]) -> list[Part]:
    return [Part.reward(counting.options, batch, size) for batch in BATCHES]


def main() -> None:
    from alignprop_fast.models.architectures import NAMES

    SHIPPED.mkdir(exist_ok=True)
    for path in SHIPPED.iterdir():
        path.unlink()  # what is counted now must not take anything from them
    sizes = set()
    for model in NAMES:
        made: dict[str, str] = {}
        for rank in RANKS:
            counting = counting_of(model, rank)
            for part in parts_of_model(counting):
                counted = counting.count_model(part)
                made[part.key] = as_text(counted)
                sizes.add(tuple(int(counted.costs.origin[side]) for side in ("height", "width")))
        _write(part.shipped_in, made)
    made = {}
    for reward in REWARDS:
        counting = counting_of("sdxl", reward=reward)
        for height, width in sorted(sizes):
            for part in parts_of_reward(counting, (height, width)):
                made[part.key] = as_text(counting.count_reward(part))
    _write(part.shipped_in, made)


def _write(path: Path, texts: dict[str, str]) -> None:
    write_whole(path, archive(texts))
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    main()
