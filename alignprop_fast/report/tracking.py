"""Pictures to accelerate's trackers, each of which takes them in a form of its own; numbers go through `log` alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

TRACKERS = ("tensorboard", "trackio", "wandb")


def log_picture(trackers: Iterable[Any], name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to every tracker of TRACKERS among `trackers` (accelerate's); others are left out."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [picture]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(picture)}, step=step)
