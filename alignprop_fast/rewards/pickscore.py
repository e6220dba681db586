"""PickScore: how strongly people prefer a picture for a prompt.

Kirstain et al., "Pick-a-Pic: an open dataset of user preferences for text-to-image generation", 2023, section 4:
score = exp(s) <f(image), g(prompt)> with normalised embeddings of a CLIP ViT-H/14 trained on preferences and its
learned temperature s (exp(s) = 100). Pictures of today's models score about 18 to 24. A picture that scores 1 more than
another is preferred with probability 73 % (1 / (1 + 1/e)).

Weights: the folder `yuvalkirstain/PickScore_v1`, in the transformers format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.rewards.clip import ClipScore
from alignprop_fast.rewards.weights import DEFAULT, RewardLoading


class PickScore(ClipScore):
    """The CLIP similarity times the model's own temperature."""

    def __init__(self, folder: str | Path, loading: RewardLoading = DEFAULT) -> None:
        """folder: as in `ClipScore`, with its errors."""
        # Read it before the weights are cast, because half precision would round the temperature of 100 to 99.
        super().__init__(folder, replace(loading, dtype=torch.float32))
        self.scale = self.model.logit_scale.exp().item()
        self.model.to(loading.dtype)

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size; prompts: B strings. Returns scores, fp32, [B]."""
        similarity_B, info = super().forward(images_BCHW, prompts, metadata)
        return self.scale * similarity_B, info
