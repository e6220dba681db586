"""Makes the counts that the package ships, so that a plan of a built-in model answers in seconds.

    python -m alignprop_fast.cli.make_counts

They hold under default options for batch sizes 1, 2 and 4 (whose plans need them), on every GPU, with every published
reward. Run it after a change of what a step runs or of the versions in `constraints.txt`: a test says when.
"""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from alignprop_fast.cli.counting import Counting
from alignprop_fast.cli.kept_counts import SHIPPED, Part
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.parts import resolved
from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.files import write_whole
from alignprop_fast.planner import GPUS, packed

BATCHES = (1, 2, 4)
REWARDS = ("clip", "hpsv2", "pickscore", "imagereward", "aesthetic")


def counting_of(model: str, reward: str = "hpsv2") -> Counting:
    """The counting of `plan --model MODEL --reward REWARD`."""
    options = resolved(PlanOptions(model=model, reward=reward), "bf16")
    return Counting(Console(quiet=True), options, make_config(options, "meta", ""), GPUS[0])


def parts_of_model(counting: Counting) -> list[Part]:
    return [Part.model(counting.options, batch) for batch in BATCHES]


def parts_of_reward(counting: Counting, size: tuple[int, int]) -> list[Part]:
    return [Part.reward(counting.options, batch, size) for batch in BATCHES]


def main() -> None:
    from alignprop_fast.models.architectures import NAMES

    sizes = set()
    made: dict[Path, bytes] = {}
    for model in NAMES:
        counting = counting_of(model)
        for part in parts_of_model(counting):
            counted = counting.count_model(part)
            made[part.shipped] = packed(counted)
            sizes.add(tuple(int(counted.costs.origin[side]) for side in ("height", "width")))
        print(f"{model}: {sum(map(len, made.values())) / 1000:.0f} kB so far", flush=True)
    for reward in REWARDS:
        counting = counting_of("sdxl", reward)
        for height, width in sorted(sizes):
            for part in parts_of_reward(counting, (height, width)):
                made[part.shipped] = packed(counting.count_reward(part))
        print(f"{reward}: {sum(map(len, made.values())) / 1000:.0f} kB so far", flush=True)
    SHIPPED.mkdir(exist_ok=True)
    for path in set(SHIPPED.iterdir()) - set(made):
        path.unlink()
    for path, content in made.items():
        write_whole(path, content)


if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    main()
