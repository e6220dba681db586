"""Pictures side by side, curves and tables of an evaluation: what is shown is what was given."""

import csv

import numpy as np
import torch
from PIL import Image

from alignprop_fast.evaluation.evaluate import BASE, Evaluation, Variant, tasks_of
from alignprop_fast.prompts.rows import PromptRow
from alignprop_fast.report.evaluation import _points, plot_by_scale, save_comparison, save_table
from alignprop_fast.report.pictures import to_images


def position(page, image, factor=12):
    """Where the page shows the image enlarged, (x, y), or None."""
    big, pixels = np.asarray(image).repeat(factor, 0).repeat(factor, 1), np.asarray(page)
    height, width = big.shape[:2]
    for y, x in np.argwhere((pixels[: -height + 1, : -width + 1] == big[0, 0]).all(-1)):
        if np.array_equal(pixels[y : y + height, x : x + width], big):
            return int(x), int(y)
    return None


def test_prompts_go_down_and_variants_across(tmp_path):
    images = to_images(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    rows = [("a rather long prompt, wrapped", images[:3], "abc"), ("b", images[3:], "def")]
    save_comparison(tmp_path / "grid.png", "title", ["base", "x \u00d7 1", "a name that does not fit here " * 3], rows)
    page = Image.open(tmp_path / "grid.png")
    places = [position(page, image) for image in images]
    assert None not in places
    assert len({y for _, y in places[:3]}) == 1 and places[3][1] > places[0][1] + 192
    assert places[0][0] < places[1][0] < places[2][0] and [x for x, _ in places[:3]] == [x for x, _ in places[3:]]
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def summaries(scales, values=(0.2, 0.8)):
    evaluation = Evaluation(lambda images, prompts, metadata: (images.mean((1, 2, 3)), {}))
    for variant in (BASE, *(Variant("x", scale) for scale in scales)):
        images_BCHW = torch.tensor(values).view(2, 1, 1, 1).expand(2, 3, 4, 4) * (1 + variant.scale)
        evaluation.add(variant, tasks_of("prompts", [PromptRow("a"), PromptRow("b, c")], 1, 0), images_BCHW)
    return evaluation


def test_tables_give_numbers_in_full(tmp_path):
    evaluation = summaries([0.5])
    save_table(tmp_path / "evaluation.csv", evaluation.scores)
    with open(tmp_path / "evaluation.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["prompt"] for row in rows] == ["a", "b, c"] * 2 and list(rows[0])[-2:] == ["part", "value"]
    assert [float(row["value"]) for row in rows] == [score.value for score in evaluation.scores]


def test_the_curve_starts_at_the_base_model(tmp_path):
    results = summaries([1.0, 0.5]).summaries()
    # Pictures of 0.2 and 0.8, brighter by the scale: mean 0.5, standard deviation 0.6 / sqrt 2, error that / sqrt 2.
    expected = [(scale, 0.5 * (1 + scale), 0.3 * (1 + scale)) for scale in (0, 0.5, 1)]
    assert np.allclose(_points(results, "reward", "prompts", "x"), expected)
    plot_by_scale(tmp_path / "plot.png", results)
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int)
    assert (np.abs(pixels - (47, 111, 222)) < 40).all(-1).sum() > 1000, "no curve"
