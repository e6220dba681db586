"""A plan as a picture: memory over one training step, by kind, with the budget and the phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_fast.planner import CostTable, Moment, Plan, by_group, format_bytes, simulate
from alignprop_fast.report.style import GREY, INK, RULE, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GIB = 2**30
# Okabe and Ito 2008: colour-blind people can tell them apart. They go from dark to light, so that grey prints work too.
_COLOURS = {
    "weights": "#44546a",
    "other": "#000000",
    "adapters and optimizer": "#0072b2",
    "workspace": "#56b4e9",
    "kept": "#e69f00",
    "transient": "#f7d9a0",
}
_BUDGET = "#c0392b"


@dataclass(frozen=True)
class _Phase:
    """Consecutive moments of one kind."""

    name: str
    start: float
    end: float


def plot_plan(path: str | Path, table: CostTable, plan: Plan, title: str) -> None:
    """Plot the memory over a training step under the plan: GiB by kind over seconds, the budget as a line.

    Each part of the step (a denoising step, the decoder, the reward, forward or back) is drawn at its worst moment.

    Raises:
        ValueError: the plan names an option or a stage that the table lacks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    moments = simulate(table, plan)
    figure = Figure(figsize=(10, 5.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _areas(axes, moments)
    axes.set_xlim(0, moments[-1].start_seconds + moments[-1].seconds)
    axes.set_ylim(0, 1.09 * max(plan.peak_bytes, plan.budget_bytes or 0) / _GIB)
    _budget(axes, plan)
    rows = _name_phases(axes, _phases(moments))
    _finish(axes, f"{title}\npeak {format_bytes(plan.peak_bytes)}, {plan.seconds:.3g} s a training step", rows)
    save_figure(figure, Path(path))


def _areas(axes: Axes, moments: Sequence[Moment]) -> None:
    """Draw stacked kinds of memory for each moment."""
    seconds = [time for m in moments for time in (m.start_seconds, m.start_seconds + m.seconds)]
    sizes = [by_group(moment.kinds) for moment in moments for _ in range(2)]
    floor = [0.0] * len(seconds)
    for group, colour in _COLOURS.items():
        if any(groups.get(group, 0) for groups in sizes):
            top = [low + groups.get(group, 0) / _GIB for low, groups in zip(floor, sizes, strict=True)]
            axes.fill_between(seconds, floor, top, color=colour, lw=0, label=group)
            floor = top
    axes.plot(seconds, floor, color=INK, lw=0.9)


def _budget(axes: Axes, plan: Plan) -> None:
    if plan.budget_bytes is None:
        return
    height = plan.budget_bytes / _GIB
    axes.axhline(height, color=_BUDGET, lw=1.6, ls=(0, (6, 3)))
    axes.annotate(
        f"budget {format_bytes(plan.budget_bytes)}",
        (0, height),
        xytext=(5, 4),
        textcoords="offset points",
        color=_BUDGET,
        fontweight="bold",
        fontsize=9,
    )


def _phases(moments: Sequence[Moment]) -> list[_Phase]:
    """The phases in order of time. Decoder and reward, forward and back, are joined, because they are short."""

    def name(moment: Moment) -> str:
        if moment.phase in ("decoder", "reward"):
            return "decoder, reward"
        if moment.phase == "resident steps":
            return "resident, backward" if moment.label.endswith("backward") else "resident"
        return "sampling" if moment.phase == "sampling" else "replayed steps"

    phases = []
    for key, group in groupby(moments, name):
        part = list(group)
        phases.append(_Phase(key, part[0].start_seconds, part[-1].start_seconds + part[-1].seconds))
    return phases


def _name_phases(axes: Axes, phases: Sequence[_Phase]) -> int:
    """Draw names above the axes and lines between the phases; returns the number of rows of names.

    A name wider than its phase gets a pointer, and a row in which it overlaps no other name.
    """
    whole = phases[-1].end or 1.0
    ends: list[float] = []  # of the last name in each row
    for phase in phases:
        if phase.start > 0:
            axes.axvline(phase.start, color=INK, lw=0.6, ls=":")
        width = (0.0085 * len(phase.name) + 0.01) * whole  # width of the text
        middle = (phase.start + phase.end) / 2
        left = min(max(middle - width / 2, 0), max(whole - width, 0))
        row = next((k for k, end in enumerate(ends) if end <= left), len(ends))
        ends[row : row + 1] = [left + width]
        narrow = phase.end - phase.start < width
        axes.annotate(
            phase.name,
            (middle, 1.0),
            xytext=(left + width / 2, 1.02 + 0.05 * row),
            xycoords=axes.get_xaxis_transform(),
            textcoords=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            color=INK,
            fontsize=9,
            zorder=10 - row,  # names hide the pointers of those above them
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.7, "shrinkA": 0, "shrinkB": 0} if narrow else None,
        )
    return len(ends)


def _finish(axes: Axes, title: str, rows: int) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=12 + 16 * rows)
    axes.set_xlabel("seconds since the training step began", color=INK)
    axes.set_ylabel("memory at the worst moment of each part, GiB", color=INK)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelcolor=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.legend(frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(_COLOURS))
