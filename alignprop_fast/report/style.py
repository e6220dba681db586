"""Colours, fonts and saving of figures for all pictures of a report."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageFont

from alignprop_fast.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY, RULE = "#1d2430", "#6b7482", "#d9dde3"
BLUE, ORANGE, GREEN = "#2f6fde", "#e07b27", "#2f9e62"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a whole PNG. Dollar signs in its texts are not read as formulas, because users write them."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of all pictures with text."""
    from matplotlib import get_data_path

    # matplotlib's own font, so that pictures look the same on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)
