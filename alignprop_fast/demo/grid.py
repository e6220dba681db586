"""Draws the picture grid of the README with the bundled model and the plain diffusers pipeline.

python -m alignprop_fast.demo.grid --output docs/pictures/demo_grid.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from alignprop_fast.demo import model_path

PROMPTS = (
    "a red apple",
    "a cat",
    "a panda on a yellow background",
    "a house",
    "two cats on a blue background",
    "three red hearts",
    "four mushrooms on a green background",
    "a frog",
    "a blue car",
    "three stars on a black background",
    "a strawberry and a banana",
    "a tree and a sun",
)
COLUMNS, TILE_PIXELS, CAPTION_PIXELS, MARGIN = 4, 192, 24, 8


def draw_grid(
    pictures: list[Image.Image], captions: Sequence[str], columns: int = COLUMNS, tile_pixels: int = TILE_PIXELS
) -> Image.Image:
    """One sheet of enlarged pictures with their captions underneath."""
    rows = -(-len(pictures) // columns)
    cell_width, cell_height = tile_pixels + MARGIN, tile_pixels + CAPTION_PIXELS
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = MARGIN + index % columns * cell_width, MARGIN + index // columns * cell_height
        sheet.paste(picture.resize((tile_pixels, tile_pixels), Image.Resampling.BICUBIC), (left, top))
        pen.text((left + tile_pixels / 2, top + tile_pixels + 3), caption, fill="black", anchor="ma", font=font)
    return sheet


def main() -> None:
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(arguments.model)
    pictures = pipe(
        list(PROMPTS),
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        generator=torch.Generator().manual_seed(arguments.seed),
    ).images
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(pictures, PROMPTS).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
