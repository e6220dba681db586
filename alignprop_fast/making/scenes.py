"""Composes captioned scenes of one to four things on plain backgrounds. A scene depends only on its seed."""

import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alignprop_fast.demo.vocabulary import BACKGROUNDS, THINGS, Thing, noun_phrase
from alignprop_fast.making.sprites import Sprites

PICTURE_PIXELS = 64

# Centres of the things in a picture of side 1, by count. Jitter makes them vary, and mirroring.
_LAYOUTS = {
    1: [[(0.50, 0.50)]],
    2: [[(0.27, 0.50), (0.73, 0.50)], [(0.28, 0.28), (0.72, 0.72)]],
    3: [[(0.27, 0.72), (0.73, 0.72), (0.50, 0.27)], [(0.27, 0.28), (0.73, 0.28), (0.50, 0.73)]],
    4: [[(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]],
}
_SIDE_PIXELS = {1: (46, 54), 2: (27, 30), 3: (26, 29), 4: (26, 29)}  # smallest, largest longer side


@dataclass(frozen=True)
class Scene:
    """`things` holds one entry per drawn thing (so its length is the count)."""

    things: tuple[Thing, ...]
    background: str
    caption: str


@dataclass(frozen=True)
class Mix:
    """Shares of scenes with one thing and with two to four of a kind; the rest holds two different things."""

    one: float = 0.35
    several: float = 0.40
    with_held_out: bool = True  # whether scenes with `is_held_out` may be drawn


def combination(scene: Scene) -> str:
    """What `is_held_out` tells scenes apart by: things and background, or two different things on any background."""
    names = sorted(f"{thing.colour} {thing.noun}".strip() for thing in scene.things)
    return " + ".join(names if len(set(names)) > 1 else [*names, scene.background])


def is_held_out(scene: Scene) -> bool:
    """One combination in ten, chosen by its checksum: the text-to-image model is judged on these, untrained."""
    return zlib.crc32(combination(scene).encode()) % 10 == 0


def random_scene(rng: random.Random, mix: Mix = Mix()) -> Scene:
    """A scene of this mix; half of them are on white."""
    while True:
        scene = _random_scene(rng, mix)
        if mix.with_held_out or not is_held_out(scene):
            return scene


def _random_scene(rng: random.Random, mix: Mix) -> Scene:
    background = "white" if rng.random() < 0.5 else rng.choice([name for name in BACKGROUNDS if name != "white"])
    first, second = rng.sample(THINGS, 2)
    kind = rng.random()
    count = 1 if kind < mix.one or kind >= mix.one + mix.several else rng.choice((2, 3, 4))
    caption = noun_phrase(first, count, name_colour=rng.random() < 0.7)
    things = (first,) * count
    if kind >= mix.one + mix.several:
        things = (first, second)
        caption += " and " + noun_phrase(second, 1, name_colour=rng.random() < 0.7)
    if background != "white" or rng.random() < 0.2:
        caption += f" on a {background} background"
    return Scene(things, background, caption)


def draw_scene(scene: Scene, sprites: Sprites, rng: random.Random) -> Image.Image:
    """An RGB picture of `PICTURE_PIXELS` squared: random layout, place, size and tilt."""
    colour = tuple(min(255, max(0, channel + rng.randint(-4, 4))) for channel in BACKGROUNDS[scene.background])
    if scene.background == "white":
        colour = BACKGROUNDS["white"]
    picture = Image.new("RGB", (PICTURE_PIXELS, PICTURE_PIXELS), colour)
    centres = list(rng.choice(_LAYOUTS[len(scene.things)]))
    if rng.random() < 0.5:
        centres = [(1 - x, y) for x, y in centres]
    jitter = 0.04 if len(centres) == 1 else 0.02
    for thing, (x, y) in zip(scene.things, centres, strict=True):
        sprite = sprites[thing]
        sprite = sprite.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC, expand=True)
        scale = rng.uniform(*_SIDE_PIXELS[len(centres)]) / max(sprite.size)
        size = (round(sprite.width * scale), round(sprite.height * scale))
        sprite = sprite.resize(size, Image.Resampling.LANCZOS)
        left = round((x + rng.uniform(-jitter, jitter)) * PICTURE_PIXELS - size[0] / 2)
        top = round((y + rng.uniform(-jitter, jitter)) * PICTURE_PIXELS - size[1] / 2)
        picture.paste(sprite, (left, top), sprite)
    return picture


def make_pictures(sprites: Sprites, number: int, seed: int, mix: Mix = Mix()) -> tuple[torch.Tensor, list[str]]:
    """`number` scenes: uint8 pictures [N, 3, 64, 64] and their captions."""
    pictures = np.empty((number, PICTURE_PIXELS, PICTURE_PIXELS, 3), np.uint8)
    captions = []
    for index in range(number):
        rng = random.Random(f"{seed}:{index}")
        scene = random_scene(rng, mix)
        pictures[index] = np.asarray(draw_scene(scene, sprites, rng))
        captions.append(scene.caption)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), captions


def to_signed(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] to fp32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def save_grid(pictures: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Writes pictures [N, 3, H, W] in [0, 1] as one PNG for the eye."""
    number, _, height, width = pictures.shape
    sheet = Image.new("RGB", (columns * width, -(-number // columns) * height), "white")
    for index, picture in enumerate((pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        sheet.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    sheet.save(path)
