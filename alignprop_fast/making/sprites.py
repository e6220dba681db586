"""Renders emoji of the npm package @iconify-json/noto (Apache-2.0, SVG) into RGBA sprites."""

import io
import json
from pathlib import Path

from PIL import Image

from alignprop_fast.demo.vocabulary import THINGS, Thing

SPRITE_PIXELS = 96
PACKAGE = "@iconify-json/noto"

Sprites = dict[Thing, Image.Image]


def load_sprites(node_modules: Path) -> Sprites:
    """Sprites by thing, cropped to the drawing, longer side `SPRITE_PIXELS`.

    Raises:
        FileNotFoundError: the package is not in `node_modules`.
    """
    folder = node_modules / PACKAGE
    if not folder.is_dir():
        raise FileNotFoundError(f"{node_modules} has no {PACKAGE}; run `npm install {PACKAGE}`")
    icons = json.loads((folder / "icons.json").read_text())
    names = json.loads((folder / "chars.json").read_text())
    return {thing: _trim(_render_icon(icons, names[thing.codepoint])) for thing in THINGS}


def _render_icon(icons: dict, name: str) -> Image.Image:
    import resvg_py

    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    size = 2 * SPRITE_PIXELS  # rendered larger, so that trimming the margin does not enlarge pixels
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))))


def _trim(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = SPRITE_PIXELS / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)
