"""Image-text alignment: cosine similarity under a CLIP model.

Radford et al., "Learning transferable visual models from natural language supervision", 2021:
score = <f(image), g(prompt)> / (|f(image)| |g(prompt)|), a number in [-1, 1]. It is not scaled by CLIP's temperature,
nor by the 2.5 or 100 of various "CLIP scores". Published models give about 0.2 to 0.35 for a fitting prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop_fast.prompts.limits import CutTexts, TextReader
from alignprop_fast.rewards.preprocess import Preprocess, at_least_fp32
from alignprop_fast.rewards.weights import DEFAULT, RewardLoading, load_model, load_tokenizer, model_folder, model_type

_CACHED_PROMPTS = 10_000


class Similarity(nn.Module):
    """Cosine similarity of image and prompt under a transformers `CLIPModel`. Weights frozen, of any float dtype."""

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self._text_embeddings: dict[str, Tensor] = {}  # normalised, by prompt
        self._length = model.config.text_config.max_position_embeddings
        self._cut = CutTexts([TextReader("the reward's CLIP", tokenizer, self._length)], "prompts", one_by_one=1)

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size. prompts: B strings, cut to the model's context length; the log
        says so.

        Returns cosine similarities, fp32, [B]. The gradient reaches the images; each text is embedded once, without
        one.
        """
        image_BE = image_embeddings(self.model, self.preprocess(images_BCHW))
        text_BE = self._embed(prompts).to(image_BE.device)
        return (image_BE * text_BE).sum(-1), {}

    # Not under inference mode either, because its tensors cannot be used in a later backward pass.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        known = self._text_embeddings
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if missing:
            self._cut.look_at(missing)
            form: dict[str, Any] = {"truncation": True, "max_length": self._length, "return_tensors": "pt"}
            tokens = self.tokenizer(missing, padding=True, **form)
            tokens = tokens.to(self.model.device)
            text = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            embeddings_BE = F.normalize(at_least_fp32(self.model.text_projection(text.pooler_output)), dim=-1)
            known.update(zip(missing, embeddings_BE.unbind(), strict=True))
        result_BE = torch.stack([known[prompt] for prompt in prompts])
        if len(known) > _CACHED_PROMPTS:
            known.clear()
        return result_BE


class ClipScore(Similarity):
    """`Similarity` with any CLIP folder in the transformers format."""

    def __init__(self, folder: str | Path, loading: RewardLoading = DEFAULT) -> None:
        """folder: a `CLIPModel` with its tokenizer and image processor, or its Hub id.

        Raises FileNotFoundError, OSError or ValueError, one line each, if it is missing, damaged or of another kind.
        """
        folder = clip_folder(folder, loading)
        preprocess, tokenizer = Preprocess.from_folder(folder), load_tokenizer(folder, "CLIP model")
        super().__init__(load_clip(folder, loading), tokenizer, preprocess)


def image_embeddings(model: Any, pixels_BCHW: Tensor) -> Tensor:
    """CLIP's embeddings of preprocessed pixels, normalised, fp32 or wider, [B, E]."""
    pixels_BCHW = pixels_BCHW.to(model.visual_projection.weight.dtype)
    pooled_BC = model.vision_model(pixel_values=pixels_BCHW).pooler_output
    return F.normalize(at_least_fp32(model.visual_projection(pooled_BC)), dim=-1)


def clip_folder(model: str | Path, loading: RewardLoading) -> Path:
    """The local folder of a CLIP model. Raises as `ClipScore` does."""
    folder = model_folder(model, "CLIP model", loading)
    if (kind := model_type(folder)) != "clip":
        raise ValueError(f"{folder} holds a model of type {kind!r}, not 'clip'; give a CLIP folder")
    return folder


def load_clip(folder: Path, loading: RewardLoading) -> Any:
    """The frozen `CLIPModel` of a folder."""
    from transformers import CLIPModel

    return load_model(CLIPModel, folder, "CLIP model", loading)
