"""Sends pictures to accelerate's trackers, each in the form that it takes. Numbers need only accelerate's `log`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

TRACKERS = ("tensorboard", "trackio", "wandb")


def log_picture(trackers: Iterable[Any], name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to those of accelerate's `trackers` that are in TRACKERS."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [picture]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(picture)}, step=step)
