r"""Draws the pictures of plans.md from a cost table and from the package's own rules.

    alignprop-fast plan --model sdxl --gpu "RTX 4090" --reward hpsv2 --batch-size 1 --host-memory 11.36GiB \
        --save-table sdxl.json
    python docs/figures.py --table sdxl.json

memory.png   memory over one training step: all resident, all replayed, planned
options.png  what each option of a transformer block keeps, and what a whole step keeps and takes under it
gates.png    which steps carry gradient, and the two ways that the gradient takes
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from alignprop_fast.planner import (
    GRADES,
    BlockOption,
    CostTable,
    Plan,
    StageChoice,
    budget_on,
    by_group,
    find_gpu,
    format_bytes,
    leanest,
    load_table,
    price,
    simulate,
    solve,
)
from alignprop_fast.report.style import BLUE, GREY, INK, ORANGE, RULE, save_figure
from alignprop_fast.sampling import draw_gates

GIB = 2**30
NUM_STEPS, GRAD_STEPS = 50, range(25, 50)
GPU = find_gpu("RTX 4090")
BUDGET_BYTES = budget_on(GPU.name, GPU.memory_bytes, 24 * GIB)[0]
FILLS = {
    "weights": "#44546a",
    "adapters and optimizer": "#0072b2",
    "workspace": "#56b4e9",
    "kept": "#e69f00",
    "transient": "#f7d9a0",
}
# Elements per token and width of a transformer block by kind of result, in the order in which the options give them up.
KINDS = (
    ("outputs of the norms", 2, "#f7d9a0"),
    ("GEGLU projection", 8, "#e69f00"),
    ("queries, keys, values", 4, "#56b4e9"),
    ("residual stream inside", 2, "#009e73"),
    ("attention outputs", 2, "#0072b2"),
    ("block input", 1, "#44546a"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="what plan --save-table wrote")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "pictures")
    args = parser.parse_args()
    table = load_table(args.table)
    draw_memory(table, args.output_dir / "memory.png")
    draw_options(table, args.output_dir / "options.png")
    draw_gates_picture(args.output_dir / "gates.png")


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    axes.tick_params(colors=GREY, labelcolor=INK, length=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def draw_memory(table: CostTable, path: Path) -> None:
    """Three plans for the same gates, on the same axis of time; the first has an axis of memory of its own."""
    whole, lean = StageChoice("batch", {"*": BlockOption.KEEP}), leanest(NUM_STEPS, GRAD_STEPS)
    plans = {
        "everything kept (all steps resident)": Plan(
            NUM_STEPS, tuple(GRAD_STEPS), (), ({"*": BlockOption.KEEP},) * len(GRAD_STEPS), {}, whole, whole
        ),
        "no budget: every step replayed": Plan(
            NUM_STEPS, (), lean.replayed_steps, (), everywhere(table, "attention"), lean.decoder, whole
        ),
        "planned for a 24 GB card": solve(table, NUM_STEPS, GRAD_STEPS, BUDGET_BYTES),
    }
    figure = new_figure(9, 8.4)
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, plan) in zip(panels, plans.items(), strict=True):
        priced = price(table, plan)
        _fill_memory(axes, table, plan)
        axes.set_title(
            f"{name}:  peak {priced.peak_bytes / GIB:.1f} GiB,  {priced.seconds:.1f} s a training step",
            loc="left",
            color=INK,
            fontsize=11,
            fontweight="bold",
        )
        top = max(1.15 * priced.peak_bytes, 1.15 * BUDGET_BYTES) / GIB
        axes.set_ylim(0, top)
        axes.axhline(BUDGET_BYTES / GIB, color="#c0392b", lw=1.4, ls=(0, (6, 3)))
        axes.annotate(
            f"budget {format_bytes(BUDGET_BYTES)}",
            (1, BUDGET_BYTES / GIB),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-3, 4),
            textcoords="offset points",
            ha="right",
            color="#c0392b",
            fontsize=9,
            fontweight="bold",
        )
    panels[1].set_ylabel("memory at the worst moment of each part, GiB", color=INK)
    panels[2].set_xlabel("seconds since the training step began (estimated)", color=INK)
    panels[2].set_xlim(0, max(price(table, plan).seconds for plan in plans.values()))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(FILLS), frameon=False)
    save_figure(figure, path)


def _fill_memory(axes: Axes, table: CostTable, plan: Plan) -> None:
    moments = simulate(table, plan)
    seconds = [time for m in moments for time in (m.start_seconds, m.start_seconds + m.seconds)]
    sizes = [by_group(m.kinds) for m in moments for _ in range(2)]
    floor = [0.0] * len(seconds)
    for group, colour in FILLS.items():
        top = [low + groups.get(group, 0) / GIB for low, groups in zip(floor, sizes, strict=True)]
        axes.fill_between(seconds, floor, top, color=colour, lw=0, label=group)
        floor = top
    axes.plot(seconds, floor, color=INK, lw=0.8)
    axes.grid(axis="y", color=RULE, lw=0.8)
    plain(axes)


def draw_options(table: CostTable, path: Path) -> None:
    """Left: a transformer block in units of tokens x width. Right: a whole guided step, kept GiB and seconds."""
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    for row, grade in enumerate(GRADES):
        start = 0
        kinds = KINDS if grade == "recompute" else KINDS[GRADES.index(grade) :]
        for name, size, colour in reversed(kinds[-1:] if grade == "recompute" else kinds):
            left.barh(row, size, left=start, color=colour, label=name if grade == "keep" else None, height=0.62)
            start += size
        left.text(start + 0.3, row, f"{start} C", va="center", color=INK, fontsize=10)
    left.set_yticks(range(len(GRADES)), GRADES)
    left.invert_yaxis()
    left.set_xlim(0, 22)
    left.set_xticks([])
    left.set_title("Kept per token of a transformer block of width C", loc="left", color=INK, fontweight="bold")
    left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    plain(left)
    _plot_steps(right, table)
    save_figure(figure, path)


def _plot_steps(axes: Axes, table: CostTable) -> None:
    for ending, colour, label in (("", BLUE, "on the GPU"), ("+offload", ORANGE, "offloaded to host memory")):
        points = [whole_step(table, grade, ending) for grade in GRADES]
        kept = [(device + host) / GIB for device, host, _ in points]
        axes.plot(kept, [seconds for _, _, seconds in points], "o-", color=colour, lw=1.2, label=label)
        if not ending:
            for grade, x, (_, _, seconds) in zip(GRADES, kept, points, strict=True):
                axes.annotate(
                    grade, (x, seconds), xytext=(0, -14), textcoords="offset points", ha="center", color=INK, fontsize=9
                )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("kept by one guided step, GiB", color=INK)
    axes.set_ylabel("seconds, forward and back", color=INK)
    axes.set_title("SDXL, 1024 x 1024, estimated for an RTX 4090", loc="left", color=INK, fontweight="bold")
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    plain(axes)


def everywhere(table: CostTable, grade: str, ending: str = "") -> dict[str, str]:
    """Option by segment: the grade where the segment knows it, else everything kept."""
    found = {}
    for segment in table.step:
        known = {option.name for option in segment.options}
        wanted = grade if grade in known else "keep"
        found[segment.name] = wanted + ending if wanted + ending in known else wanted
    return found


def whole_step(table: CostTable, grade: str, ending: str) -> tuple[int, int, float]:
    """(bytes on the device, bytes in host memory, seconds) where all blocks that know the grade take it."""
    options = everywhere(table, grade, ending)
    chosen = [segment.option(options[segment.name]) for segment in table.step]
    return sum(o.kept_bytes for o in chosen), sum(o.host_bytes for o in chosen), sum(o.seconds for o in chosen)


def draw_gates_picture(path: Path, num_steps: int = 12, seed: int = 0) -> None:
    """One draw of the rule `uniform`, and how likely each step is to be open."""
    random.seed(seed)
    gates = draw_gates("uniform", num_steps)
    figure = new_figure(11, 4.3)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-1.2, num_steps + 3.0)
    axes.set_ylim(-2.1, 2.5)
    for step in range(num_steps):
        _box(axes, step, 0, f"step\n{step}", ORANGE if step in gates else "#c9ced6")
    for column, name in ((num_steps + 0.15, "decoder"), (num_steps + 1.3, "reward")):
        _box(axes, column, 0, name, "#9ec5e8", width=0.95)
    axes.text(-0.55, 0, "noise", ha="right", va="center", color=INK)
    _gradient_arrows(axes, gates, num_steps)
    for step in range(num_steps):
        share = (step + 1) / (num_steps + 1)
        axes.bar(step, share, width=0.5, bottom=1.05, color=GREY, alpha=0.45)
        axes.text(step, 1.1 + share, f"{share:.2f}", ha="center", va="bottom", color=INK, fontsize=8)
    axes.text(num_steps - 0.3, 1.1, "how likely a step\nis to carry gradient", color=INK, fontsize=9, va="bottom")
    axes.set_title(
        f"Gates of one chain: {len(gates)} of {num_steps} steps carry gradient (orange)",
        loc="left",
        color=INK,
        fontweight="bold",
    )
    save_figure(figure, path)


def _box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 0.8) -> None:
    corner = (x - width / 2, y - 0.42)
    axes.add_patch(FancyBboxPatch(corner, width, 0.84, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="none"))
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=9)


def _gradient_arrows(axes: Axes, gates: Sequence[int], num_steps: int) -> None:
    """The linear path under all steps, and the way down into the adapters at each open gate."""
    _arrow(axes, (num_steps + 1.75, -0.75), (-0.4, -0.75), INK, 1.6)
    axes.text(num_steps + 1.85, -0.75, "gradient:\nlinear path", va="center", color=INK, fontsize=9)
    for step in gates:
        _arrow(axes, (step, -0.75), (step, -1.45), "#c0392b", 1.6)
    middle, style = (num_steps - 1) / 2, "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((-0.4, -1.95), num_steps - 0.2, 0.45, boxstyle=style, fc="#f3d3cf", ec="none"))
    axes.text(middle, -1.73, "adapters: gradients of all open steps add up", ha="center", va="center", color=INK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, lw=width))


if __name__ == "__main__":
    main()
