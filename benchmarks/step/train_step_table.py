"""The table of training steps in Markdown and as a picture, from the rows of its CSV."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

Row = dict[str, str]
GIB = 2**30


def markdown(rows: Sequence[Row]) -> str:
    """A table for each model: a row for each batch size and number of gradient steps, columns for budgets and rivals.

    A cell holds the seconds per step and, in brackets, the peak in GiB; if it does not fit, the least budget.
    """
    return "\n\n".join(_of_model(model, list(own)) for model, own in groupby(sorted(rows, key=_model), key=_model))


def _model(row: Row) -> str:
    return row["model"]


def _of_model(model: str, rows: list[Row]) -> str:
    columns = list(dict.fromkeys(_column(row) for row in sorted(rows, key=_order)))
    lines = dict.fromkeys((int(row["batch"]), int(row["grad_steps"])) for row in rows)
    cells = {(int(row["batch"]), int(row["grad_steps"]), _column(row)): _cell(row) for row in rows}
    head = f"**{model}**, {rows[0]['steps']} steps, reward {rows[0]['reward']}, {rows[0]['device']}: "
    text = [head + "seconds a step (peak, GiB)", "", "| batch | K | " + " | ".join(columns) + " |"]
    text.append("|---" * (2 + len(columns)) + "|")
    for batch, grad_steps in sorted(lines):
        found = [cells.get((batch, grad_steps, column), "") for column in columns]
        text.append(f"| {batch} | {grad_steps} | " + " | ".join(found) + " |")
    return "\n".join(text)


def _order(row: Row) -> tuple[bool, float, str]:
    return row["variant"] != "ours", float(row["budget_gib"] or 0), row["variant"]


def _column(row: Row) -> str:
    return f"{float(row['budget_gib']):g} GiB" if row["variant"] == "ours" else row["variant"]


def _cell(row: Row) -> str:
    if row["status"] == "does not fit":
        return f"needs {int(row['least_bytes']) / GIB:.1f} GiB"
    if row["status"] == "out of memory":
        return row["status"]
    seconds, peak = row["seconds"] or row["predicted_seconds"], row["peak_bytes"] or row["predicted_peak_bytes"]
    text = f"{float(seconds):.3g} ({int(peak) / GIB:.1f})" if seconds else f"({int(peak) / GIB:.1f})"
    return f"*{text}*" if row["status"] == "more than the GPU has" else text


def plot(rows: Sequence[Row], file: Path, grad_steps: Sequence[int] = (1, 25)) -> None:
    """Plot samples per second over peak memory: a panel per model and number of gradient steps, a line per batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in rows if row["samples_per_second"]]
    there = sorted({int(row["grad_steps"]) for row in done})
    shown = [k for k in there if k in grad_steps] or there[:1]
    panels = [(model, k) for model in dict.fromkeys(row["model"] for row in done) for k in shown]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (model, k) in zip(axes[0], panels, strict=True):
        own = [row for row in done if row["model"] == model and int(row["grad_steps"]) == k]
        for index, batch in enumerate(sorted({int(row["batch"]) for row in own})):
            color = f"C{index}"
            for variant, mark in (("ours", "o-"), ("eager", "s"), ("compiled", "^"), ("trl", "D")):
                points = sorted(
                    (int(row["peak_bytes"] or row["predicted_peak_bytes"]) / GIB, float(row["samples_per_second"]))
                    for row in own
                    if row["variant"] == variant and int(row["batch"]) == batch
                )
                label = f"batch {batch}" if variant == "ours" else f"{variant}, batch {batch}"
                if points:
                    axis.plot(*zip(*points, strict=True), mark, color=color, markersize=4, label=label)
        axis.set(xlabel="peak, GiB", title=f"{model}, gradient through {k} of {own[0]['steps'] if own else ''} steps")
        axis.set_ylim(0, 1.15 * max((float(row["samples_per_second"]) for row in own), default=1))
        axis.legend(frameon=False, fontsize=7)
    axes[0][0].set_ylabel("samples a second")
    figure.suptitle(f"one training step, {done[0]['device']}", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)
