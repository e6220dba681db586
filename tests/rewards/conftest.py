"""Real pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignprop_fast.demo import pictures_path
from alignprop_fast.rewards.jpeg_calibration import square_pictures

PHOTOS = Path(__file__).parent / "photos"


@pytest.fixture(scope="session")
def pictures() -> Callable[[str, int], Tensor]:
    """pictures("photos" | "demo", size) -> [N, 3, size, size] in [0, 1], exact 8-bit values."""

    def load(name: str, size: int) -> Tensor:
        folder = {"photos": PHOTOS, "demo": pictures_path()}[name]
        return torch.stack(list(square_pictures(folder, size)))

    return load
