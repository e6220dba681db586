"""Scenes are functions of their seed and show what their caption says. Sprites are plain squares: no npm packages."""

import random

import numpy as np
import pytest
from PIL import Image

from alignprop_fast.demo.vocabulary import BACKGROUNDS, COUNT_WORDS, THINGS, noun_phrase
from alignprop_fast.making.scenes import Mix, draw_scene, is_held_out, make_pictures, random_scene
from alignprop_fast.making.sprites import SPRITE_PIXELS, load_sprites

MARK = (255, 0, 255, 255)


@pytest.fixture(scope="module")
def sprites():
    sprite = Image.new("RGBA", (SPRITE_PIXELS, SPRITE_PIXELS))
    quarter = SPRITE_PIXELS // 4  # the margin keeps neighbours apart, so that regions can be counted
    sprite.paste(MARK, (quarter, quarter, 3 * quarter, 3 * quarter))
    return dict.fromkeys(THINGS, sprite)


def separate_regions(mask: np.ndarray) -> int:
    """Number of 4-connected regions of True."""
    mask, number = mask.copy(), 0
    while mask.any():
        number += 1
        stack = [tuple(np.argwhere(mask)[0])]
        while stack:
            y, x = stack.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
                mask[y, x] = False
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return number


def test_pictures_hold_as_many_things_as_the_caption_says(sprites):
    counts = set()
    for seed in range(60):
        rng = random.Random(seed)
        scene = random_scene(rng)
        pixels = np.asarray(draw_scene(scene, sprites, rng)).astype(int)
        shown = separate_regions(np.abs(pixels - MARK[:3]).sum(-1) < 30)
        assert shown == len(scene.things), scene.caption
        same_kind = len(set(scene.things)) == 1 and len(scene.things) > 1
        said = COUNT_WORDS[shown] if same_kind else scene.caption.split()[0]
        assert scene.caption.startswith(f"{said} ")
        counts.add((shown, same_kind))
    assert counts == {(1, False), (2, True), (3, True), (4, True), (2, False)}


def test_the_background_has_the_colour_of_the_caption(sprites):
    for seed in range(20):
        rng = random.Random(seed)
        scene = random_scene(rng)
        corner = draw_scene(scene, sprites, rng).getpixel((0, 0))
        assert np.abs(np.subtract(corner, BACKGROUNDS[scene.background])).max() <= 4  # the jitter of draw_scene
        assert scene.background in scene.caption or scene.background == "white"


def test_the_same_seed_gives_the_same_pictures(sprites):
    first, captions = make_pictures(sprites, 5, seed=3)
    again, captions_again = make_pictures(sprites, 5, seed=3)
    other, _ = make_pictures(sprites, 5, seed=4)
    assert first.equal(again) and captions == captions_again
    assert not first.equal(other)


def test_colours_are_said_where_they_must_be():
    green_apple = next(thing for thing in THINGS if thing.noun == "apple" and thing.colour == "green")
    red_apple = next(thing for thing in THINGS if thing.noun == "apple" and thing.colour == "red")
    assert noun_phrase(green_apple, 1, name_colour=False) == "a green apple"
    assert noun_phrase(red_apple, 1, name_colour=False) == "an apple"
    assert noun_phrase(red_apple, 3, name_colour=True) == "three red apples"


def test_missing_packages_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm install"):
        load_sprites(tmp_path)


def test_training_scenes_leave_out_what_is_judged():
    rng, mix = random.Random(0), Mix(one=0.25, several=0.40, with_held_out=False)
    scenes = [random_scene(rng, mix) for _ in range(2000)]
    assert not any(is_held_out(scene) for scene in scenes)
    # Standard error of a share of 2000: 0.011.
    assert sum(len(set(scene.things)) == 2 for scene in scenes) / 2000 == pytest.approx(0.35, abs=0.045)
    assert any(is_held_out(random_scene(rng)) for _ in range(200))


def test_two_different_things_are_held_out_on_every_background():
    pairs = {}
    for seed in range(3000):
        scene = random_scene(random.Random(seed), Mix(one=0.0, several=0.0))
        pairs.setdefault(frozenset(scene.things), set()).add(is_held_out(scene))
    assert all(len(verdicts) == 1 for verdicts in pairs.values())
