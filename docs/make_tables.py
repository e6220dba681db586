"""Writes the figures in the pages' tables anew from the files of `benchmarks/results/`.

python -P docs/make_tables.py

Rows, units and words are the page's own, and so are a figure's decimals.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
GIB, MIB = 2**30, 2**20
FIGURE = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")

Row = dict[str, str]
Cell = str | Sequence[float]
"""A cell's text, or the figures in it."""


@dataclass(frozen=True)
class Table:
    """A table of a page.

    head: its first line. cells: gives the cells of a row after its first ones, of which it takes `labels`.
    """

    page: str
    head: str
    cells: Callable[..., Iterable[Cell]]
    labels: int = 1

    def written(self, lines: Sequence[str]) -> Iterator[str]:
        """The page's lines with this table's figures.

        Raises:
            ValueError: a row has more or fewer cells or figures than there should be.
        """
        begin = lines.index(self.head) + 2
        end = next(i for i in range(begin, len(lines)) if not lines[i].startswith("|"))
        yield from lines[:begin]
        for line in lines[begin:end]:
            old = [cell.strip() for cell in line[1:-1].split("|")]
            kept, others = old[: self.labels], old[self.labels :]
            new = [_filled(*cells) for cells in zip(others, self.cells(*kept), strict=True)]
            yield f"| {' | '.join([*kept, *new])} |"
        yield from lines[end:]


def _filled(old: str, cell: Cell) -> str:
    """The cell's new text: as the old one, with other figures."""
    if isinstance(cell, str):
        return cell
    figures = FIGURE.findall(old)
    if len(figures) != len(cell):
        raise ValueError(f"the cell {old!r} has {len(figures)} figures, not {len(cell)}: write it by hand first")
    values = iter(cell)
    return FIGURE.sub(lambda match: f"{next(values):,.{len(match[0].partition('.')[2])}f}", old)


@cache
def _file(name: str) -> tuple[Row, ...]:
    with open(RESULTS / name, newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def found(name: str, **values: str) -> Row:
    """The one row of a file with these values in these columns."""
    (row,) = (row for row in _file(name) if values.items() <= row.items())
    return row


# By their names on the pages, without the number of steps.
MODELS = {
    "Chroma": "chroma",
    "FLUX.1 dev": "flux-dev",
    "FLUX.2-dev": "flux2-dev",
    "FLUX.2-klein 4B": "flux2-klein-4b",
    "FLUX.2-klein 9B": "flux2-klein-9b",
    "Krea 2": "krea2",
    "Lumina 2": "lumina2",
    "Qwen-Image": "qwen-image",
    "SANA": "sana",
    "SD 1.5": "sd15",
    "SD1.5": "sd15",
    "SD3.5 medium": "sd35-medium",
    "SDXL": "sdxl",
    "Z-Image": "z-image",
    "Z-Image-Turbo": "z-image-turbo",
}
GPUS = {"H100": "H100 SXM", "RTX 4090": "RTX 4090"}


def planned(model: str, base: str, gpu: str, size_gb: int) -> str:
    """Seconds of a training step, or what it needs. model: with its number of steps."""
    name, _, steps = model.removesuffix(" steps").rpartition(", ")
    key = {"model": MODELS[name], "steps": steps, "base": base, "gpu": gpu, "size_gb": str(size_gb)}
    row = found("estimated/model_plans.csv", **key)
    if not row["seconds"]:
        return f"no: {float(row['least_gib']):.2f} GiB"
    seconds = float(row["seconds"])
    return f"{seconds:.{0 if seconds >= 100 else 1}f}"


def by_budget(model: str, base: str) -> Iterable[str]:
    return (planned(model, base, "RTX 4090", size_gb) for size_gb in (12, 16, 24))


def by_card(model: str, base: str) -> Iterable[str]:
    return (planned(model, base, *card) for card in (("RTX 4090", 24), ("RTX 5090", 32), ("H100 SXM", 80)))


def lever(model: str, gpu: str, name: str, column: str) -> float:
    return float(found("estimated/levers.csv", model=model, gpu=GPUS[gpu], lever=name)[column])


def of_levers(label: str) -> Iterator[Cell]:
    """Seconds of a training step by model and GPU."""
    named = {"no lever": "text", "CUDA graphs": "graphs"}
    name = named.get(label, label.strip("`").split()[-1])
    name = f"host {name[:-3]} GiB" if name.endswith("GiB") else name
    for model in ("sdxl", "flux-dev"):
        for gpu in ("RTX 4090", "H100"):
            yield [lever(model, gpu, name, "training_step_seconds")]


def of_closed_steps(label: str) -> Iterator[Cell]:
    """SDXL: bytes more, then for each GPU the milliseconds of a closed step and the seconds of a training step."""
    name = {"text in each step": "none", "text once (default)": "text", "and merged adapters": "merged"}.get(label)
    name = name or label.removeprefix("and ")
    more_bytes = lever("sdxl", "H100", "none" if name == "text" else name, "more_bytes")
    yield {"none": [], "text": [-more_bytes / MIB]}.get(name, [more_bytes / GIB])
    for gpu in ("RTX 4090", "H100"):
        yield [lever("sdxl", gpu, name, "closed_step_ms")]
        yield [lever("sdxl", gpu, name, "training_step_seconds")]


def of_merging(label: str) -> Iterator[Cell]:
    """Bytes of the copies, milliseconds to merge, what closed and training steps took and take, what that saves."""
    name, _, gpu = label.rpartition(", ")
    model = MODELS[name.removesuffix(" in fp8")]
    more_bytes = lever(model, gpu, "merged", "more_bytes")
    yield [more_bytes / (MIB if more_bytes < GIB else GIB)]
    yield [lever(model, gpu, "merged", "once_ms")]
    for column in ("closed_step_ms", "training_step_seconds"):
        before, after = (lever(model, gpu, name, column) for name in ("text", "merged"))
        yield [before, after]
    yield f"{100 * (1 - after / before):z.1f} %"


def of_kept_bytes(label: str) -> Iterator[Cell]:
    """GiB that one step keeps under each option."""
    model = MODELS[label.partition(",")[0]]
    for option in ("stock", "keep", "norms", "geglu", "qkv", "attention", "recompute"):
        yield [int(found(f"meta/step_options_{model}.csv", option=option)["kept_bytes"]) / GIB]


def counted(model: str, variant: str, column: str) -> int:
    return int(found("meta/calls.csv", model=MODELS[model], variant=variant)[column])


def of_transformers(label: str) -> Iterator[Cell]:
    """GiB kept, or calls, by model, and their share of stock's. The first row of a name has the GiB."""
    of_calls = "calls" in label
    variant = {"`keep`": "kernels", "`recompute`": "recompute", "floor": "floor"}.get(label.removesuffix(", calls"))
    for model in ("FLUX.1 dev", "FLUX.2-klein 4B", "Z-Image", "Qwen-Image", "Krea 2"):
        columns = ("forward", "both") if of_calls else ("kept_bytes",)
        values = [counted(model, variant or "stock", column) for column in columns]
        share = [] if variant is None else [values[-1] / counted(model, "stock", columns[-1])]
        yield [*(value if of_calls else value / GIB for value in values), *share]


def of_calls(label: str) -> Iterator[Cell]:
    """Calls forward, and forward and back, by model."""
    words = {"diffusers and PEFT, fused attention": "stock", "PyTorch's products for LoRA": "products"}
    for model in ("SD 1.5", "SDXL", "SD3.5 medium", "FLUX.1 dev"):
        yield [counted(model, words.get(label, "kernels"), column) for column in ("forward", "both")]


def of_host_time(label: str) -> Iterator[Cell]:
    """Ours over PyTorch's by way."""
    op = label.split("`")[1]
    for way in ("sampled", "forward", "both"):
        rows = [row for row in _file("cpu/host_cost.csv") if (row["op"], row["way"]) == (op, way)]
        yield [float(row["ratio"]) for row in rows]


def of_decoder(label: str) -> Iterator[Cell]:
    """GiB at the peak."""
    ways = {"diffusers": "stock", "this package's operators, all kept": "keep", "a checkpoint per block": "block"}
    way = ways.get(label, "stages" if "stages" in label else "bands")
    yield [int(found("meta/decoder_options_1024.csv", way=way)["peak_bytes"]) / GIB]


def of_rules(label: str) -> Iterator[Cell]:
    """Seconds of a training step and GiB at its peak by model."""
    for model in ("sdxl", "flux-dev"):
        row = found("estimated/rule_costs.csv", model=model, rule=label.strip("`"))
        yield [float(row["seconds"])]
        yield [int(row["peak_bytes"]) / GIB]


def of_cosines(label: str) -> Iterator[Cell]:
    """Of the expected gradient, its error, and of one draw, by chain. One figure where all agree."""
    for chain in ("demo-12", "demo-50", "flow-12", "twin-4"):
        row = found("cpu/estimators.csv", chain=chain, rule=label.strip("`"))
        cosine, error, one = (f"{float(row[name]):z.2f}" for name in ("cosine", "cosine_error", "one_draw_cosine"))
        yield cosine if (cosine, error) == (one, "0.00") else f"{cosine} ({error}); {one}"


BENCHMARKS, CHEAPER = "benchmarks.md", "decisions/cheaper-steps-without-gradient.md"
TABLES = (
    Table("turbo-and-klein.md", "| model | base | 12 GiB | 16 GiB | 24 GB card |", by_budget, labels=2),
    Table(
        "turbo-and-klein.md",
        "| model, steps | base | RTX 4090, 24 GB | RTX 5090, 32 GB | H100, 80 GB |",
        by_card,
        labels=2,
    ),
    Table(
        BENCHMARKS,
        "| kept by one step, GiB | diffusers and PEFT | `keep` | `norms` | `geglu` | `qkv` | `attention` | `recompute` "
        "|",
        of_kept_bytes,
    ),
    Table(BENCHMARKS, "| | FLUX.1 dev | FLUX.2-klein 4B | Z-Image | Qwen-Image | Krea 2 |", of_transformers),
    Table(BENCHMARKS, "| forward, forward and back | SD 1.5 | SDXL | SD3.5 medium | FLUX.1 dev |", of_calls),
    Table(BENCHMARKS, "| times PyTorch's | without gradient | forward | forward and back |", of_host_time),
    Table(BENCHMARKS, "| way | peak, GiB |", of_decoder),
    Table(
        BENCHMARKS,
        "| seconds a training step | SDXL, RTX 4090 | SDXL, H100 | FLUX.1 dev, RTX 4090 | FLUX.1 dev, H100 |",
        of_levers,
    ),
    Table(
        CHEAPER,
        "| | bytes more | RTX 4090: closed step, ms | training step, s | H100: closed step, ms | training step, s |",
        of_closed_steps,
    ),
    Table(CHEAPER, "| | copies | merging, ms | closed step, ms | training step, s | saved |", of_merging),
    Table(
        "which-rule.md",
        "| rule | SDXL: s a training step | peak, GiB | FLUX.1: s a training step | peak, GiB |",
        of_rules,
    ),
    Table("which-rule.md", "| rule | demo-12 | demo-50 | flow-12 | twin-4 |", of_cosines),
)
PAGES = sorted({table.page for table in TABLES})


def written(page: str) -> str:
    """The page with the figures of its tables."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    for table in TABLES:
        if table.page == page:
            lines = list(table.written(lines))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(written(name), encoding="utf-8")
