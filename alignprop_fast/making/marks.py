"""Marks of a bundled text-to-image model: how often it draws what it was told, judged by the bundled counter and CLIP.

    python -m alignprop_fast.making.marks --model alignprop_fast/demo/model --steps 12 --guidance-scale 3

The prompts are the combinations that training leaves out (`scenes.is_held_out`); CLIP chooses among the 64 prompts of
`prompts.txt` and `prompts_heldout.txt`. `--real` judges composed pictures instead: the most that the judges can give.
"""

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.demo import clip_path, counter_path, model_path, prompts_path
from alignprop_fast.demo.counter_network import Counter, soft_counts
from alignprop_fast.demo.vocabulary import BACKGROUNDS, THINGS, noun_phrase
from alignprop_fast.making.scenes import Scene, draw_scene, is_held_out, save_grid
from alignprop_fast.making.sprites import load_sprites

BORDER_PIXELS = 2  # the frame of a picture that shows its background
BATCH_SIZE = 32


def caption(things: tuple, background: str) -> str:
    """The caption with colours named, and the background where it is not white."""
    kinds = list(dict.fromkeys(things))
    phrases = [noun_phrase(kind, things.count(kind), name_colour=True) for kind in kinds]
    return " and ".join(phrases) + (f" on a {background} background" if background != "white" else "")


def held_out_scenes() -> list[Scene]:
    """Every scene that training leaves out, with one thing, several of a kind, or two different things on white."""
    several = [((thing,) * count, name) for thing in THINGS for count in (1, 2, 3, 4) for name in BACKGROUNDS]
    two = [(pair, "white") for pair in itertools.combinations(THINGS, 2)]
    scenes = [Scene(things, name, caption(things, name)) for things, name in several + two]
    return [scene for scene in scenes if is_held_out(scene)]


def all_prompts() -> list[str]:
    """The 64 prompts of both files."""
    return [line for held_out in (False, True) for line in prompts_path(held_out).read_text("utf-8").splitlines()]


def background_names(pictures_BCHW: Tensor) -> list[str]:
    """The named background that the median colour of each frame is closest to. Pictures are in [0, 1]."""
    inner = torch.zeros(pictures_BCHW.shape[-2:], dtype=torch.bool)
    inner[BORDER_PIXELS:-BORDER_PIXELS, BORDER_PIXELS:-BORDER_PIXELS] = True
    median_B3 = pictures_BCHW[:, :, ~inner].median(-1).values
    names = list(BACKGROUNDS)
    colours_N3 = torch.tensor([BACKGROUNDS[name] for name in names]) / 255
    return [names[index] for index in torch.cdist(median_B3, colours_N3).argmin(1).tolist()]


@torch.no_grad()
def counts(pictures_BCHW: Tensor, counter: Counter) -> Tensor:
    """Rounded counts, [B, len(counter.classes)], of pictures in [0, 1]."""
    parts = [soft_counts(counter(2 * part - 1)) for part in pictures_BCHW.split(BATCH_SIZE)]
    return torch.cat(parts).round().long()


def judge_scenes(pictures_BCHW: Tensor, scenes: list[Scene], counter: Counter) -> dict[str, list[bool]]:
    """Verdicts by mark. Pictures in [0, 1], one per scene.

    one: the thing that is named alone is there. count: as many as named, of 1 to 4. two: both things and no third.
    background: the one that is named.
    """
    verdicts: dict[str, list[bool]] = {"one": [], "count": [], "two": [], "background": []}
    backgrounds = background_names(pictures_BCHW)
    for scene, found, background in zip(scenes, counts(pictures_BCHW, counter), backgrounds, strict=True):
        named = {counter.classes.index(thing.noun) for thing in scene.things}
        numbers = [int(found[index]) for index in named]
        if len(named) == 2:
            verdicts["two"].append(min(numbers) >= 1 and int((found > 0).sum()) == 2)
        else:
            verdicts["count"].append(numbers[0] == len(scene.things))
        if len(scene.things) == 1:
            verdicts["one"].append(numbers[0] >= 1)
        if "background" in scene.caption:
            verdicts["background"].append(background == scene.background)
    return verdicts


@torch.no_grad()
def clip_finds(pictures_BCHW: Tensor, wanted: list[int], prompts: list[str], clip: Any, tokenizer: Any) -> list[bool]:
    """Whether CLIP scores the prompt with the wanted index highest among `prompts`. Pictures in [0, 1]."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    parts = pictures_BCHW.split(BATCH_SIZE)
    best = torch.cat([clip(input_ids=tokens, pixel_values=2 * part - 1).logits_per_image.argmax(1) for part in parts])
    return [found == index for found, index in zip(best.tolist(), wanted, strict=True)]


def sharpness(pictures_BCHW: Tensor) -> float:
    """Root mean square of the differences of neighbouring pixels: squared, as one step counts more than a slope."""
    return (sum(pictures_BCHW.diff(dim=axis).square().mean().item() for axis in (-1, -2)) / 2) ** 0.5


@dataclass
class Painter:
    """Pictures of a `StableDiffusionPipeline`, each batch from its own seed."""

    pipe: Any
    steps: int
    guidance_scale: float
    seed: int = 0

    def __call__(self, prompts: list[str]) -> Tensor:
        """[len(prompts), 3, H, W] in [0, 1]."""
        parts = []
        for start in range(0, len(prompts), BATCH_SIZE):
            generator = torch.Generator().manual_seed(self.seed * 100_003 + start)
            parts.append(
                self.pipe(
                    prompts[start : start + BATCH_SIZE],
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance_scale,
                    generator=generator,
                    output_type="pt",
                ).images
            )
        return torch.cat(parts)


def marks(painter: Any, repeats: int, folder: Path | None = None) -> dict[str, float]:
    """Shares from 0 to 1 by mark, each picture drawn `repeats` times, with their numbers as "n <mark>".

    `painter` maps a list of prompts to pictures in [0, 1]; they are written to `folder` as sheets, if given.
    """
    from transformers import CLIPModel, CLIPTokenizer

    counter = Counter.load(counter_path()).eval()
    scenes, prompts = held_out_scenes() * repeats, all_prompts()
    pictures_BCHW = painter([scene.caption for scene in scenes])
    verdicts = judge_scenes(pictures_BCHW, scenes, counter)
    clip = CLIPModel.from_pretrained(clip_path(), local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_path(), local_files_only=True)
    told = painter(prompts * repeats)
    verdicts["clip of 64"] = clip_finds(told, list(range(len(prompts))) * repeats, prompts, clip, tokenizer)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_grid(pictures_BCHW[: len(scenes) // repeats], folder / "held_out.png", columns=12)
        save_grid(told[: len(prompts)], folder / "prompts.png", columns=12)
    shares = {name: sum(values) / len(values) for name, values in verdicts.items()}
    numbers = {f"n {name}": float(len(values)) for name, values in verdicts.items()}
    return {**shares, "sharpness": sharpness(pictures_BCHW), **numbers}


@dataclass
class RealPainter:
    """Composed pictures instead of drawn ones: what the judges say of pictures that are right."""

    data: Path

    def __call__(self, prompts: list[str]) -> Tensor:
        """[len(prompts), 3, 64, 64] in [0, 1]."""
        sprites, rng = load_sprites(self.data), random.Random(0)
        import numpy as np

        drawn = [np.asarray(draw_scene(parse(prompt), sprites, rng)) for prompt in prompts]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255


def parse(prompt: str) -> Scene:
    """The scene that a caption of `scenes.py` describes."""
    text, _, rest = prompt.partition(" on a ")
    things: list = []
    for phrase in text.split(" and "):
        things += next(
            [thing] * count
            for thing in THINGS
            for count in (1, 2, 3, 4)
            for name_colour in (True, False)
            if noun_phrase(thing, count, name_colour) == phrase
        )
    return Scene(tuple(things), rest.removesuffix(" background") or "white", prompt)


def main() -> None:
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=model_path(), help="folder of the pipeline")
    parser.add_argument("--variant", help="of the weights, such as twin")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=2, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=Path, help="folder of the npm packages: judge composed pictures instead")
    parser.add_argument("--pictures", type=Path, help="folder for sheets of the first pictures")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.real:
        painter: Any = RealPainter(arguments.real)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(
            arguments.model, variant=arguments.variant, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        painter = Painter(pipe, arguments.steps, arguments.guidance_scale, arguments.seed)
    result = marks(painter, arguments.repeats, arguments.pictures)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
