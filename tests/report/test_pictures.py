"""Pictures, curves and records: what is written is what was given, also after a process died while writing."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from alignprop_fast.report.curves import plot_rewards, smoothed
from alignprop_fast.report.json_lines import JsonLines
from alignprop_fast.report.pictures import Pictures, save_before_after, save_grid, save_image, to_images


def some_pictures(count=3, size=16, seed=0, rewards=True):
    images_BCHW = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return Pictures(
        to_images(images_BCHW),
        tuple(f"prompt number {i} that is rather long" for i in range(count)),
        tuple(range(count)),
        tuple(0.25 * i for i in range(count)) if rewards else (),
    )


def test_to_images_rounds_to_the_nearest_level():
    images_BCHW = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert np.asarray(to_images(images_BCHW)[0])[0, :, 0].tolist() == [0, 0, 1, 255]
    assert np.asarray(to_images(torch.tensor([-1.0, 2.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))[0]).max() == 255


def contains(page, image, factor):
    """Whether the page shows the image, each pixel as a square of factor x factor."""
    big = np.asarray(image).repeat(factor, 0).repeat(factor, 1)
    pixels = np.asarray(page)
    height, width = big.shape[:2]
    corners = np.argwhere((pixels[: -height + 1, : -width + 1] == big[0, 0]).all(-1))
    return any(np.array_equal(pixels[y : y + height, x : x + width], big) for y, x in corners)


def test_a_grid_shows_every_picture_enlarged_and_crisp(tmp_path):
    pictures = some_pictures(5)
    save_grid(tmp_path / "grid.png", pictures, "title")
    page = Image.open(tmp_path / "grid.png")
    assert all(contains(page, image, 12) for image in pictures.images)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_before_is_above_after(tmp_path):
    before, after = some_pictures(2, seed=0), some_pictures(2, seed=1)
    save_before_after(tmp_path / "pair.png", before, after, "title")
    page = Image.open(tmp_path / "pair.png")
    assert all(contains(page, image, 12) for image in (*before.images, *after.images))
    top = page.crop((0, 0, page.width, 300))
    assert contains(top, before.images[0], 12) and not contains(top, after.images[0], 12)
    with pytest.raises(ValueError, match="same prompts and seeds"):
        save_before_after(tmp_path / "pair.png", before, some_pictures(3), "title")


def test_large_pictures_are_shrunk(tmp_path):
    save_grid(tmp_path / "grid.png", some_pictures(1, size=1024, rewards=False), "title")
    assert Image.open(tmp_path / "grid.png").width < 600


def test_records_survive_a_torn_line(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    for step in (1, 2, 3):
        lines.append({"step": step, "reward_mean": math.nan if step == 2 else 0.5, "parts": {"a": (1.0, math.inf)}})
    assert json.loads(lines.path.read_text().splitlines()[1])["reward_mean"] is None
    with open(lines.path, "a") as stream:
        stream.write('{"step": 4, "rew')
    assert [record["step"] for record in lines.read()] == [1, 2, 3]
    lines.keep_until(2)
    lines.append({"step": 3})
    assert [record["step"] for record in lines.read()] == [1, 2, 3]
    assert lines.read()[0] == {"step": 1, "reward_mean": 0.5, "parts": {"a": [1.0, None]}}


def test_a_full_disk_leaves_what_was_there(files_up_to, tmp_path):
    lines, picture = JsonLines(tmp_path / "metrics.jsonl"), tmp_path / "picture.png"
    lines.append({"step": 1})
    save_image(Image.new("RGB", (8, 8)), picture)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for write in (
        lambda: lines.append({"step": 2, "text": "x" * 1000}),
        lambda: save_image(noise, picture),
    ):
        with files_up_to(500), pytest.raises(OSError, match="File too large"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_texts_in_a_plot_are_no_formulas(tmp_path):
    records = [{"step": 1, "reward_mean": 1.0, "reward_parts": {"$x_{$": 1.0, "b": 2.0}}]
    plot_rewards(tmp_path / "reward.png", records)
    assert (tmp_path / "reward.png").is_file()


def test_smoothed_keeps_a_constant_and_follows_a_step():
    assert smoothed([2.0] * 9) == pytest.approx([2.0] * 9)
    rise = smoothed([0.0] * 20 + [1.0] * 20)
    assert rise[19] == 0 and 0 < rise[20] < 1 and rise[39] > 0.95
    gap = smoothed([1.0, None, math.nan, 1.0])
    assert gap == pytest.approx([1.0] * 4)
    assert math.isnan(smoothed([None])[0])


def dark_pixels(path, rgb):
    return int((np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - rgb).sum(-1) < 12).sum())


def test_the_curve_shows_rewards_and_parts(tmp_path):
    records = [
        {"step": i, "reward_mean": None if i == 3 else math.sin(i), "reward_parts": {"a": 1.0 * i, "b": -1.0 * i}}
        for i in range(1, 20)
    ]
    plot_rewards(tmp_path / "parts.png", records, [{"step": 0, "reward_mean": 0.1}, {"step": 19, "reward_mean": None}])
    plot_rewards(tmp_path / "plain.png", [{**record, "reward_parts": {"a": 1.0}} for record in records])
    plot_rewards(tmp_path / "empty.png", [])
    parts, plain = Image.open(tmp_path / "parts.png"), Image.open(tmp_path / "plain.png")
    assert parts.height > plain.height  # one panel more for each of several parts, none for a single one
    assert dark_pixels(tmp_path / "parts.png", (47, 158, 98)) > 500 > dark_pixels(tmp_path / "plain.png", (47, 158, 98))
    assert (
        dark_pixels(tmp_path / "plain.png", (47, 111, 222)) > 500 > dark_pixels(tmp_path / "empty.png", (47, 111, 222))
    )


def test_what_is_watched_and_the_distance_to_the_base_model_have_panels(tmp_path):
    records = [{"step": i, "reward_mean": 0.1 * i, "reward_parts": {"a": 1.0}} for i in range(1, 9)]
    look = {"reward": 0.5, "diversity": 0.2, "parts": {}}
    samples = [{"step": i, "reward_mean": 0.1 * i, "watch": look} for i in (0, 4, 8)]
    plot_rewards(tmp_path / "plain.png", records, [{"step": 0, "reward_mean": 0.1}])
    plot_rewards(tmp_path / "watched.png", records, samples)
    plot_rewards(tmp_path / "base.png", [{**record, "base_mse": 0.1} for record in records], samples)
    heights = [Image.open(tmp_path / f"{name}.png").height for name in ("plain", "watched", "base")]
    assert heights[1] - heights[0] == pytest.approx(2 * (heights[2] - heights[1]), abs=2)
    assert heights[2] > heights[1]
    orange = [dark_pixels(tmp_path / f"{name}.png", (224, 123, 39)) for name in ("plain", "watched")]
    assert orange[1] > 500 + orange[0]


def test_no_global_state_of_matplotlib_is_touched(tmp_path):
    code = (
        "import sys; from alignprop_fast.report.curves import plot_rewards;"
        f"plot_rewards({str(tmp_path / 'x.png')!r}, [{{'step': 1, 'reward_mean': 0.0}}]);"
        "print([name for name in ('matplotlib.pyplot', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
