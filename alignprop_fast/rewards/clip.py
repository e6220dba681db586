"""Image-text alignment: cosine similarity under a CLIP model.

Radford et al., "Learning transferable visual models from natural language supervision", 2021:
score = <f(image), g(prompt)> / (|f(image)| |g(prompt)|), a number in [-1, 1]. Not scaled by CLIP's temperature, nor by
the 2.5 or 100 of the various "CLIP scores". Published models give about 0.2 to 0.35 for a fitting prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .preprocess import Preprocess

_CACHED_PROMPTS = 10_000


class ClipScore(nn.Module):
    """Cosine similarity of image and prompt under any CLIP folder in the transformers format. Weights frozen, fp32."""

    def __init__(self, folder: str | Path) -> None:
        """folder: a `CLIPModel` in safetensors with its tokenizer and image processor.

        Raises FileNotFoundError, OSError or ValueError, one line each, when it is missing, damaged or of another kind.
        """
        super().__init__()
        folder = Path(folder)
        _require_clip_config(folder)
        self.preprocess = Preprocess.from_folder(folder)
        self.model, self.tokenizer = _load(folder)
        self._text_embeddings: dict[str, Tensor] = {}  # normalised, by prompt

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size; prompts: B strings, cut to the model's context length.

        Returns cosine similarities, fp32, [B]. The gradient reaches the images; text is embedded without one, once.
        """
        pixels_BCHW = self.preprocess(images_BCHW).to(self.model.dtype)
        pooled_BC = self.model.vision_model(pixel_values=pixels_BCHW).pooler_output
        image_BE = F.normalize(self.model.visual_projection(pooled_BC).float(), dim=-1)
        text_BE = self._embed(prompts).to(image_BE.device)
        return (image_BE * text_BE).sum(-1), {}

    # Not under inference mode either, whose tensors can take no part in a later backward pass.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        known = self._text_embeddings
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if missing:
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(missing, padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = tokens.to(self.model.device)
            text = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            embeddings_BE = F.normalize(self.model.text_projection(text.pooler_output).float(), dim=-1)
            known.update(zip(missing, embeddings_BE.unbind(), strict=True))
        result_BE = torch.stack([known[prompt] for prompt in prompts])
        if len(known) > _CACHED_PROMPTS:
            known.clear()
        return result_BE


def _require_clip_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no CLIP model in {folder} (it has no config.json); give a folder in the transformers format, such as one "
            "made by `hf download openai/clip-vit-large-patch14 --local-dir FOLDER`"
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}); copy the model again") from error
    if kind != "clip":
        raise ValueError(f"{folder} holds a model of type {kind!r}, not 'clip'; give a CLIP folder")


def _load(folder: Path) -> tuple[Any, Any]:
    """The frozen model and its tokenizer. Where transformers would fill missing weights with noise, raises OSError."""
    from transformers import AutoTokenizer, CLIPModel

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # else transformers invents one
        raise FileNotFoundError(f"the CLIP model in {folder} has no tokenizer (tokenizer.json); copy the model again")
    try:
        loaded: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        model, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # many kinds from many layers, all of which mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(f"cannot load the CLIP model in {folder}: {reason}; copy the model again") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise OSError(
            f"the CLIP model in {folder} lacks {len(missing)} weights ({missing[0]}, ...); copy the model again"
        )
    return model.requires_grad_(False).eval(), tokenizer
