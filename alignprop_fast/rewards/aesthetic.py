"""LAION's aesthetic predictors: the mark from 1 to 10 that people would give a picture, from its CLIP embedding.

score = head(f(image) / |f(image)|) with CLIP ViT-L/14's image embedding f, 768 numbers. Both published heads:

    v1  sa_0_4_vit_l_14_linear.pth                Linear(768, 1)                 (LAION-AI/aesthetic-predictor, 2022)
    v2  sac+logos+ava1-l14-linearMSE.pth          768-1024-128-64-16-1, no nonlinearity between
                                                  (christophschuhmann/improved-aesthetic-predictor, 2022; the reward
                                                  "aesthetics" of DDPO, AlignProp and DRaFT)

Ordinary pictures get about 4 to 7. The prompt is not used.

Weights: a folder with CLIP (`openai/clip-vit-large-patch14`, transformers format) and the head's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alignprop_fast.rewards.clip import clip_folder, image_embeddings, load_clip
from alignprop_fast.rewards.preprocess import Preprocess
from alignprop_fast.rewards.weights import DEFAULT, RewardLoading, filled, read_state, weights_file

# The last is the v2 head's name in repositories for transformers.
_HEADS = ("sac+logos+ava1-l14-linearMSE", "sa_0_4_vit_l_14_linear", "aesthetic-model")


class Aesthetic(nn.Module):
    """The mark of each image."""

    def __init__(self, folder: str | Path, loading: RewardLoading = DEFAULT) -> None:
        """folder: a CLIP folder with a head in it (v2 if it has both), or the head's file in such a folder.

        Raises FileNotFoundError, OSError or ValueError, one line each, when something is missing or damaged.
        """
        super().__init__()
        path = Path(folder).expanduser()
        local = clip_folder(path.parent if path.is_file() else folder, loading)
        file = weights_file(path if path.is_file() else local, _HEADS, "aesthetic head")
        state = read_state(file, loading)
        self.preprocess = Preprocess.from_folder(local)
        model = load_clip(local, loading)
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection  # no text
        width = model.config.projection_dim
        if set(state) == {"weight", "bias"}:
            self.head = filled(lambda: nn.Linear(width, 1), state, file, "the linear aesthetic head")
        else:
            self.head = filled(lambda: FiveLayers(width), state, file, "the five-layer aesthetic head")

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size. Prompts are not used. Returns marks, fp32, [B]."""
        embeddings_BE = image_embeddings(self, self.preprocess(images_BCHW))
        return self.head(embeddings_BE).squeeze(-1), {}


class FiveLayers(nn.Module):
    """width-1024-128-64-16-1, without nonlinearity. Missing indices are the dropout layers used in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        gap = nn.Identity
        self.layers = nn.Sequential(
            *(nn.Linear(width, 1024), gap(), nn.Linear(1024, 128), gap(), nn.Linear(128, 64), gap()),
            *(nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    def forward(self, x_BE: Tensor) -> Tensor:
        """[B, width] -> [B, 1]"""
        return self.layers(x_BE)
