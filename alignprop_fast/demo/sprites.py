"""Renders the emoji of the npm packages into RGBA sprites.

Packages: @iconify-json/noto (Apache-2.0, SVG bodies) and @lobehub/fluent-emoji-3d (MIT, WebP).
"""

import io
import json
from pathlib import Path

from PIL import Image

from alignprop_fast.demo.vocabulary import THINGS, Thing

SPRITE_PIXELS = 96
PACKAGES = {"": "@iconify-json/noto", "3d": "@lobehub/fluent-emoji-3d"}

Sprites = dict[tuple[str, Thing], Image.Image]


def load_sprites(node_modules: Path) -> Sprites:
    """Sprites by (style, thing), cropped to what is drawn, longer side `SPRITE_PIXELS`.

    Raises:
        FileNotFoundError: a package is not in `node_modules`.
    """
    for package in PACKAGES.values():
        if not (node_modules / package).is_dir():
            raise FileNotFoundError(f"{node_modules} has no {package}; run `npm install {' '.join(PACKAGES.values())}`")
    icons = json.loads((node_modules / PACKAGES[""] / "icons.json").read_text())
    names = json.loads((node_modules / PACKAGES[""] / "chars.json").read_text())
    sprites = {}
    for thing in THINGS:
        sprites["", thing] = _trim(_render_icon(icons, names[thing.codepoint]))
        sprites["3d", thing] = _trim(_open_webp(node_modules / PACKAGES["3d"] / "assets", thing.codepoint))
    return sprites


def _render_icon(icons: dict, name: str) -> Image.Image:
    import resvg_py

    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    size = 2 * SPRITE_PIXELS  # rendered larger, so that trimming the margin does not enlarge pixels
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))))


def _open_webp(folder: Path, codepoint: str) -> Image.Image:
    path = folder / f"{codepoint}.webp"
    return Image.open(path if path.exists() else folder / f"{codepoint}-fe0f.webp")


def _trim(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = SPRITE_PIXELS / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)
