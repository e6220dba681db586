"""Writes the results of an evaluation: pictures side by side, the reward over the adapters' scale, tables."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from alignprop_fast.files import write_whole
from alignprop_fast.report.pictures import LINE, MARGIN, enlarged, save_image
from alignprop_fast.report.style import BLUE, GREEN, GREY, INK, ORANGE, RULE, font, save_figure

if TYPE_CHECKING:
    from alignprop_fast.evaluation.evaluate import Summary

_PROMPT_WIDTH = 170
_COLORS = (BLUE, ORANGE, GREEN, "#b0447d", "#7a5cc4", "#8a7a3c")


@dataclass(frozen=True)
class PathRow:
    """A row of path.csv: a picture at position t between two adapters."""

    t: float
    prompt: str
    seed: int
    reward: float


def save_table(path: Path, records: Sequence[Any]) -> None:
    """Write dataclass records of one kind as a whole CSV file with a header; numbers in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(records[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, records))
    write_whole(path, text.getvalue().encode())


def save_comparison(
    path: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[str]]],
) -> None:
    """Write a PNG with a row for each prompt and a column for each way of drawing it.

    rows: the prompt, one picture for each column, and a note under each picture, such as its reward.
    """
    cells = [enlarged(images) for _, images, _ in rows]
    width, height = cells[0][0].size
    step_x, step_y = width + MARGIN, height + LINE + MARGIN
    left, top = MARGIN + _PROMPT_WIDTH, 2 * MARGIN + 2 * LINE + 8
    inner = max(left + len(columns) * step_x, 2 * MARGIN + int(font(17, bold=True).getlength(title)))
    page = Image.new("RGB", (inner, top + len(rows) * step_y), "white")
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), title, fill=INK, font=font(17, bold=True))
    for i, column in enumerate(columns):
        pen.text((left + i * step_x, top - LINE - 2), _cut(column, width), fill=INK, font=font(14))
    for j, (prompt, _, notes) in enumerate(rows):
        y = top + j * step_y
        lines = textwrap.wrap(prompt, 20, max_lines=8, placeholder=" \u2026")
        pen.multiline_text((MARGIN, y), "\n".join(lines), fill=INK, font=font(14), spacing=4)
        for i, (image, note) in enumerate(zip(cells[j], notes, strict=True)):
            page.paste(image, (left + i * step_x, y))
            pen.text((left + i * step_x, y + height + 2), note, fill=GREY, font=font(13))
    save_image(page, path)


def _cut(text: str, width: int) -> str:
    """The text, shortened at its start to fit the width, because names of adapters differ at their ends."""
    if font(14).getlength(text) <= width:
        return text
    while text and font(14).getlength("\u2026" + text) > width:
        text = text[1:]
    return "\u2026" + text


def plot_by_scale(path: Path, summaries: Sequence[Summary]) -> None:
    """Plot each part in a panel: its mean with the standard error, over the scale of each adapter.

    Scale 0 is the base model. The first prompt set has a solid line, the others dashed ones.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(summary.part for summary in summaries))
    sets = list(dict.fromkeys(summary.prompt_set for summary in summaries))
    adapters = list(dict.fromkeys(summary.adapter for summary in summaries if summary.adapter != "base"))
    figure = Figure(figsize=(8, 1 + 2.8 * len(parts)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, part in zip(figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0], parts, strict=True):
        for adapter, color in zip(adapters, _cycled(_COLORS, len(adapters)), strict=True):
            for prompt_set in sets:
                points = _points(summaries, part, prompt_set, adapter)
                style = {
                    "ls": "-" if prompt_set == sets[0] else "--",
                    "color": color,
                    "label": f"{adapter}, {prompt_set}",
                }
                panel.errorbar(*zip(*points, strict=True), marker="o", ms=5, lw=1.8, capsize=3, **style)
        panel.set_title(part, loc="left", color=INK, fontweight="bold", fontsize=11)
        panel.grid(axis="y", color=RULE, lw=0.8)
        panel.tick_params(colors=GREY, labelcolor=INK, length=0)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.spines["bottom"].set_color(RULE)
        if part == parts[0]:
            panel.legend(frameon=False, labelcolor=INK, fontsize=9, handlelength=3.5)
    panel.set_xlabel("adapter scale (0: base model)", color=INK)
    save_figure(figure, path)


def _points(summaries: Iterable[Summary], part: str, prompt_set: str, adapter: str) -> list[tuple[float, float, float]]:
    """(scale, mean, standard error), sorted by scale."""
    chosen = [s for s in summaries if (s.part, s.prompt_set) == (part, prompt_set) and s.adapter in ("base", adapter)]
    return sorted((s.scale, s.mean, s.standard_error) for s in chosen)


def _cycled(colors: Sequence[str], count: int) -> list[str]:
    return [colors[i % len(colors)] for i in range(count)]
