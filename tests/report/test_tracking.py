"""Numbers and pictures in the trackers themselves: TensorBoard always, W&B (offline) and Trackio where installed."""

import json

import numpy as np
import pytest
from PIL import Image

from alignprop_fast.report.tracking import log_picture

TINY = ("--num-inference-steps", "2", "--batch-size", "2", "--device", "cpu")


def run(command, folder, out, tracker):
    return command(
        *("train", "--model", folder, "--reward", "colorfulness", *TINY, "--steps", 3, "--sample-every", 2),
        *("--watch-reward", "compressibility", "--watch-pictures", 2, "--log-with", tracker, "--output-dir", out),
    )


def test_tensorboard_shows_numbers_and_pictures(command, tiny_sd_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = run(command, tiny_sd_folder, tmp_path / "out", "tensorboard")
    assert (code, err) == (0, "")
    events = EventAccumulator(str(tmp_path / "out" / "alignprop-fast"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [0, 2, 3]
    grid = Image.open(tmp_path / "out" / "samples" / "step_0003.png").convert("RGB")
    last = events.Images("samples")[-1]
    assert (last.width, last.height) == grid.size
    records = [json.loads(line) for line in (tmp_path / "out" / "samples" / "samples.jsonl").read_text().splitlines()]
    for tag, key in (("watch/reward", "reward"), ("watch/diversity", "diversity")):
        logged = [event.value for event in events.Scalars(tag)]
        assert logged == pytest.approx([record["watch"][key] for record in records], rel=1e-5)
    assert {"reward_mean", "samples/reward"} <= set(events.Tags()["scalars"])


def test_wandb_takes_them(command, tiny_sd_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    code, _, _ = run(command, tiny_sd_folder, tmp_path / "out", "wandb")
    assert code == 0
    assert len(list(tmp_path.rglob("media/images/samples_*.png"))) == 3


def test_trackio_takes_them(command, tiny_sd_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the library is imported
    pytest.importorskip("trackio")
    code, _, _ = run(command, tiny_sd_folder, tmp_path / "out", "trackio")
    assert code == 0
    assert list((tmp_path / "trackio").rglob("*.db"))


class Tracker:
    """As accelerate's, keeping what it is given."""

    def __init__(self, name):
        self.name, self.seen = name, []

    def log_images(self, values, step, **options):
        self.seen.append((values, step, options))


def test_each_tracker_gets_the_picture_in_its_own_form():
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    trackers = [Tracker("tensorboard"), Tracker("wandb"), Tracker("mlflow")]
    log_picture(trackers, "grid", picture, 7)
    (values, step, options), *_ = trackers[0].seen
    assert np.array_equal(values["grid"], np.asarray(picture)[None]) and options == {"dataformats": "NHWC"}
    assert trackers[1].seen == [({"grid": [picture]}, 7, {})] and step == 7
    assert trackers[2].seen == []
