"""Plans in words: options by kind of block, steps as ranges, bytes in groups that people know."""

from collections import Counter
from collections.abc import Mapping, Sequence

from alignprop_fast.planner.block_option import EVERY_SEGMENT, BlockOption, Options

_BLOCKS = {"resnets": "residual blocks", "rest": "the rest"}

GROUPS = ("weights", "adapters and optimizer", "kept", "transient", "workspace")
_GROUP_OF = {
    "weights": "weights",
    "reward": "weights",
    "adapters": "adapters and optimizer",
    "gradients": "adapters and optimizer",
    "optimizer": "adapters and optimizer",
    "workspace": "workspace",
    "graphs": "workspace",
    "conditioning": "kept",
    "latents": "kept",
    "images": "kept",
    "kept": "kept",
    "transient": "transient",
}


def by_group(kinds: Mapping[str, int]) -> dict[str, int]:
    """Bytes by kind (`Moment.kinds`) as bytes by group: all `GROUPS`, and "other" for kinds in none of them."""
    groups = dict.fromkeys(GROUPS, 0)
    for name, size in kinds.items():
        group = _GROUP_OF.get(name, "other")
        groups[group] = groups.get(group, 0) + size
    return groups


def summary(options: Options) -> str:
    """ "attention x 60 (transformer blocks), keep x 17 (residual blocks)": options by count, and their blocks."""
    if not options:
        return "no segments"
    if set(options) == {EVERY_SEGMENT}:
        return f"{options[EVERY_SEGMENT]} everywhere"
    kinds: dict[BlockOption, Counter[str]] = {}
    for segment, option in options.items():
        kinds.setdefault(option, Counter())[_block(segment)] += 1
    parts = []
    for option, counts in sorted(kinds.items(), key=lambda item: -sum(item[1].values())):
        common = [name for name, _ in counts.most_common(3)]
        parts.append(f"{option} x {sum(counts.values())} ({', '.join(common)}{', ...' if len(counts) > 3 else ''})")
    return ", ".join(parts)


def _block(segment: str) -> str:
    """The kind of a block by its path in the model: "transformer blocks" for "mid_block.0.transformer_blocks.3"."""
    words = [part for part in segment.split(".") if part and not part.isdecimal()]
    name = words[-1] if words else segment
    return _BLOCKS.get(name, name.replace("_", " "))


def ranges(steps: Sequence[int]) -> str:
    """ "3-5, 9" for steps 3, 4, 5 and 9."""
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
