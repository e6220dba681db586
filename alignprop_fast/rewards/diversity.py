"""Diversity of the pictures of one prompt, to detect a model that draws the same picture for every seed.

D = 2 / (K (K - 1)) * sum_{i < j} (1 - <e_i, e_j>), with the normalised CLIP embedding e_i of picture i of K. This is
the mean pairwise cosine distance, 0 if all are equal. Compare only figures of the same CLIP model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from alignprop_fast.rewards.preprocess import Preprocess
from alignprop_fast.rewards.weights import DEFAULT, RewardLoading


class ImageEmbedder(nn.Module):
    """Normalised CLIP embeddings of pictures, weights frozen."""

    def __init__(self, folder: str | Path | None = None, loading: RewardLoading = DEFAULT) -> None:
        """folder: a `CLIPModel` with its image processor, or its Hub id; None: the bundled one, which was trained on
        pictures like the bundled model's.

        Raises FileNotFoundError, OSError or ValueError, one line each, if it is missing, damaged or of another kind.
        """
        from alignprop_fast.rewards.clip import clip_folder, load_clip

        super().__init__()
        if folder is None:
            from alignprop_fast.demo import clip_path

            folder = clip_path()
        folder = clip_folder(folder, loading)
        self.preprocess, self.model = Preprocess.from_folder(folder), load_clip(folder, loading)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size. Returns [B, E], fp32, of norm 1."""
        from alignprop_fast.rewards.clip import image_embeddings

        return image_embeddings(self.model, self.preprocess(images_BCHW))


def mean_pairwise_distance(embeddings_KE: Tensor) -> float:
    """D of the pictures whose normalised embeddings these are. Raises ValueError for fewer than two."""
    count = len(embeddings_KE)
    if count < 2:
        raise ValueError("diversity needs two or more pictures of a prompt")
    cosines_KK = embeddings_KE.double() @ embeddings_KE.double().T
    return 1 - float(torch.triu(cosines_KK, 1).sum()) * 2 / (count * (count - 1))
