"""Plots the curves of a run: rewards and their parts over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_fast.report.style import BLUE, GREEN, GREY, INK, ORANGE, RULE, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_rewards(path: str | Path, records: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]] = ()) -> None:
    """Plot the reward over the optimizer steps as a PNG, with every step and a smoothed curve.

    Further panels show each part of the reward, the distance to the base model and the watched reward, if there are
    any.

    records: lines of metrics.jsonl (step, reward_mean, reward_parts, base_mse).
    samples: step, reward_mean and "watch" (reward, diversity, parts) of pictures with fixed prompts and seeds. They
        show progress without the noise of training's random prompts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [record for record in records if record.get("reward_mean") is not None]
    steps = [record["step"] for record in records]
    curves = [*_part_curves(steps, records), *_watch_curves(samples)]
    figure = Figure(figsize=(8, 4.2 + 1.9 * len(curves)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1 + len(curves), 1, sharex=True, squeeze=False, height_ratios=[2.2] + [1] * len(curves))[
        :, 0
    ]
    _curve(panels[0], steps, [record["reward_mean"] for record in records], BLUE, "training batch")
    if samples:
        values = [math.nan if record["reward_mean"] is None else record["reward_mean"] for record in samples]
        panels[0].plot(
            [record["step"] for record in samples],
            values,
            "D-",
            color=ORANGE,
            ms=5,
            lw=1.2,
            label="same prompts and seeds",
        )
    panels[0].set_title("Reward", loc="left", color=INK, fontweight="bold")
    panels[0].legend(frameon=False, labelcolor=INK, loc="best")
    for panel, (title, where, values, color) in zip(panels[1:], curves, strict=True):
        if where is steps:
            _curve(panel, where, values, color, title)
        else:  # the same pictures each time need no smoothing
            numbers = [math.nan if value is None else value for value in values]
            panel.plot(where, numbers, "D-", color=color, ms=4, lw=1.2)
            _style(panel)
        panel.set_title(title, loc="left", color=INK, fontsize=10)
    panels[-1].set_xlabel("optimizer step", color=INK)
    save_figure(figure, Path(path))


_Curve = tuple[str, list[int], list[float | None], str]  # title, steps, values, colour


def _part_curves(steps: list[int], records: Sequence[dict[str, Any]]) -> list[_Curve]:
    """Each part of a reward with several parts, and the distance to the base model if it was measured."""
    names = list(dict.fromkeys(name for record in records for name in record.get("reward_parts", {})))
    curves: list[_Curve] = []
    for name in names if len(names) > 1 else []:
        values = [record.get("reward_parts", {}).get(name) for record in records]
        curves.append((f"{name} (unweighted)", steps, values, GREEN))
    distances = [record.get("base_mse") for record in records]
    if any(distance is not None for distance in distances):
        curves.append(("squared distance to the base model's output", steps, distances, GREY))
    return curves


def _watch_curves(samples: Sequence[dict[str, Any]]) -> list[_Curve]:
    """The watched reward, its parts and the diversity; empty if nothing was watched."""
    watched = [(record["step"], record["watch"]) for record in samples if record.get("watch")]
    if not watched:
        return []
    steps = [step for step, _ in watched]
    parts = list(dict.fromkeys(name for _, look in watched for name in look["parts"]))
    curves: list[_Curve] = [("watched, not trained for", steps, [look["reward"] for _, look in watched], ORANGE)]
    curves += [(f"watched: {name}", steps, [look["parts"].get(name) for _, look in watched], ORANGE) for name in parts]
    return [*curves, ("watched: diversity", steps, [look["diversity"] for _, look in watched], ORANGE)]


def smoothed(values: Sequence[float | None], share: float = 0.15) -> list[float]:
    """Exponential moving average over about `share` of the curve, without bias towards the first value."""
    weight = math.exp(-1 / max(1.0, share * len(values) / 2))
    total = norm = 0.0
    result = []
    for value in values:
        if value is not None and math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm if norm else math.nan)
    return result


def _curve(panel: Axes, steps: Sequence[int], values: Sequence[float | None], color: str, label: str) -> None:
    numbers = [math.nan if value is None else value for value in values]
    panel.plot(steps, numbers, ".", color=color, alpha=0.35, ms=7, mec="none")
    panel.plot(steps, smoothed(values), "-", color=color, lw=2, label=f"{label} (smoothed)")
    _style(panel)


def _style(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.grid(axis="y", color=RULE, lw=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=GREY, labelcolor=INK, length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(RULE)
    panel.margins(x=0.02)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
