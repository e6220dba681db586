"""Draw the package as a house: its folders (and the files beside them) are rooms, imports between them are lines.

A room stands one floor above the highest room that it imports. Rooms in a circle of imports share a floor.

    git worktree add ../before 9a38820
    python -P docs/house.py --tree ../before --tree . --output docs/pictures/house.png
"""

import argparse
import ast
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignprop_fast.report.style import BLUE, GREY, INK, ORANGE, save_figure

PACKAGE = "alignprop_fast"
Arrows = Mapping[str, set[str]]


def rooms(tree: Path) -> Arrows:
    """{room: the rooms that it imports}. Imports inside functions and for type checking count."""
    package = tree / PACKAGE
    paths = [path for path in package.rglob("*.py") if not path.relative_to(package).parts[0].startswith("__")]
    found: dict[str, set[str]] = {_room(path, package): set() for path in paths}
    for path in paths:
        room = _room(path, package)
        found[room] |= (_imported(path) & found.keys()) - {room}
    return found


def _room(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == PACKAGE:
            parts = str(node.module).split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


def below(arrows: Arrows, room: str) -> set[str]:
    """All rooms that can be reached from one."""
    seen: set[str] = set()
    left = list(arrows[room])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += arrows[name]
    return seen


def floors(arrows: Arrows) -> dict[str, int]:
    """The floor of each room, from 0."""
    under = {room: below(arrows, room) for room in arrows}
    floor = dict.fromkeys(arrows, 0)
    for _ in arrows:
        for room, names in arrows.items():
            lower = [floor[name] + 1 for name in names if room not in under[name]]
            same = [floor[name] for name in names if room in under[name]]
            floor[room] = max([floor[room], *lower, *same])
    return floor


def draw(axes: Axes, title: str, arrows: Arrows) -> None:
    """One house."""
    floor, under = floors(arrows), {room: below(arrows, room) for room in arrows}
    places: dict[str, tuple[float, float]] = {}
    for level in range(max(floor.values()) + 1):
        on_it = sorted(room for room in arrows if floor[room] == level)
        places |= {room: ((k + 1) / (len(on_it) + 1), level) for k, room in enumerate(on_it)}
    for room, names in arrows.items():
        for name in names:
            xs, ys = zip(places[room], places[name], strict=True)
            circle = room in under[name]
            axes.plot(xs, ys, color=ORANGE if circle else GREY, linewidth=2 if circle else 0.6, zorder=1)
    for room, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": BLUE, "linewidth": 1}
        axes.text(x, y, room, ha="center", va="center", fontsize=7, color=INK, bbox=box, zorder=2)
    lines = sum(map(len, arrows.values()))
    circular = sum(room in under[room] for room in arrows)
    axes.set_title(
        f"{title}: {len(arrows)} rooms, {max(floor.values()) + 1} floors, {lines} imports, {circular} rooms in circles",
        fontsize=10,
        color=INK,
    )
    axes.set_xlim(0, 1)
    axes.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, action="append", required=True, help="a checkout; several side by side")
    parser.add_argument("--output", type=Path, required=True, help="the picture (PNG)")
    options = parser.parse_args()
    titles = ["before", "after"] if len(options.tree) == 2 else [tree.resolve().name for tree in options.tree]
    figure = Figure(figsize=(9 * len(options.tree), 8), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(options.tree), squeeze=False)[0]
    for axes, title, tree in zip(panels, titles, options.tree, strict=True):
        draw(axes, title, rooms(tree))
    save_figure(figure, options.output)


if __name__ == "__main__":
    main()
