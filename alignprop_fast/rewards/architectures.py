"""Published rewards without their weights: the real networks at full size on the meta device, to count their costs.

    reward = architecture_reward("hpsv2:1.0,compressibility:0.3", torch.bfloat16)
    scores, info = reward(images_on_meta, prompts, metadata)        # only shapes; a gradient reaches the images
    reward = architecture_reward("hpsv2", torch.bfloat16, device="cuda")            # random weights, for timing

The reward's own code runs on pictures. Prompts are not read. A text embedding without gradient, made once per prompt,
is replaced by one fixed direction. A network that reads text and picture together gets blank tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_fast.prompts.limits import CutTexts
from alignprop_fast.rewards.aesthetic import Aesthetic, FiveLayers
from alignprop_fast.rewards.clip import Similarity
from alignprop_fast.rewards.imagereward import ImageReward, Network
from alignprop_fast.rewards.mixture import Part, WeightedSum
from alignprop_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from alignprop_fast.rewards.registry import get_reward, parsed_spec

# Towers of CLIP ViT-L/14 (Radford et al. 2021) and of open_clip's ViT-H/14, on which HPS v2 and PickScore build.
_VIT_L = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "projection_dim": 768,
}
_VIT_H = {
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "projection_dim": 1024,
}
# BLIP's ViT-L/16 and its BERT with cross-attention (Li et al. 2022).
_BLIP_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
_BLIP_TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "is_decoder": True,
}
_CLIP_PIXELS = Preprocess(shortest_edge=224, crop=(224, 224), mean=CLIP_MEAN, std=CLIP_STD)
_HPS_PIXELS = Preprocess(longest_edge=224, clip=False, mean=CLIP_MEAN, std=CLIP_STD)


class _Similarity(Similarity):
    """Without PickScore's scale, which is one product per picture."""

    def __init__(
        self, config: dict[str, Any], preprocess: Preprocess, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(_clip(config, dtype, device), None, preprocess)

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        width = self.model.config.projection_dim
        return torch.full((len(prompts), width), width**-0.5, device=self.model.device)


class _Aesthetic(Aesthetic):
    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)  # Aesthetic's __init__ reads files
        model = _clip(_VIT_L, dtype, device)
        self.preprocess = _CLIP_PIXELS
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        with device:
            self.head = FiveLayers(model.config.projection_dim)


class _ImageReward(ImageReward):
    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)  # ImageReward's __init__ reads files
        with device:
            self.network = Network(_BLIP_VISION, _BLIP_TEXT)
        self.network.vision.to(dtype)
        self.network.text.to(dtype)
        self.tokenizer = partial(_blank_tokens, device=device)
        self._cut = CutTexts([], "prompts")
        self.preprocess = _CLIP_PIXELS


def architecture_reward(
    spec: str,
    dtype: torch.dtype,
    model: Sequence[str | Path] = (),
    allow_pickle: bool = False,
    device: str | torch.device = "meta",
) -> WeightedSum:
    """The reward that `spec` describes (see `get_reward`), without its published weights.

    dtype: of the networks' weights. model, allow_pickle: as in `get_reward`, but `clip` needs only a config.json and a
    preprocessor_config.json, and other published rewards need no files. Rewards without published weights are loaded as
    usual. device: "meta" has shapes and no storage; on other devices weights are random.

    Raises:
        ValueError, OSError: as `get_reward`.
    """
    device = torch.device(device)
    parsed, models = parsed_spec(spec, [str(value) for value in model])
    return WeightedSum(
        [
            _part(name, weight, models.get(name.partition(":")[0]), dtype, allow_pickle, device)
            for name, weight in parsed
        ]
    )


def _part(
    name: str, weight: float, model: str | None, dtype: torch.dtype, allow_pickle: bool, device: torch.device
) -> Part:
    def similarity(config: dict[str, Any], preprocess: Preprocess) -> nn.Module:
        return _Similarity(config, preprocess, dtype, device)

    builders: dict[str, Callable[[], nn.Module]] = {
        "hpsv2": lambda: similarity(_VIT_H, _HPS_PIXELS),
        "pickscore": lambda: similarity(_VIT_H, _CLIP_PIXELS),
        "clip": lambda: similarity(*((_VIT_L, _CLIP_PIXELS) if model is None else _of_folder(model))),
        "aesthetic": lambda: _Aesthetic(dtype, device),
        "imagereward": lambda: _ImageReward(dtype, device),
    }
    if name in builders:
        return Part(name, weight, builders[name]().requires_grad_(False).eval(), by_image=True)
    (part,) = get_reward(name, device=device, dtype=dtype, model=model, allow_pickle=allow_pickle).parts
    return Part(name, weight, part.reward, part.by_image)


def _of_folder(model: str) -> tuple[dict[str, Any], Preprocess]:
    from transformers import CLIPConfig

    from alignprop_fast.rewards.clip import clip_folder
    from alignprop_fast.rewards.weights import DEFAULT

    folder = clip_folder(model, DEFAULT)
    return CLIPConfig.from_pretrained(folder).to_dict(), Preprocess.from_folder(folder)


def _clip(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import CLIPConfig, CLIPModel

    with device:
        return CLIPModel(CLIPConfig(**config)).to(dtype)


class _Tokens(dict):
    def to(self, device: Any) -> _Tokens:
        return self


def _blank_tokens(prompts: Sequence[str], *, max_length: int, device: torch.device, **form: Any) -> _Tokens:
    ids_BL = torch.zeros(len(prompts), max_length, dtype=torch.long, device=device)
    # A tensor without data cannot say whether a token is masked.
    return _Tokens(input_ids=ids_BL, attention_mask=None)
