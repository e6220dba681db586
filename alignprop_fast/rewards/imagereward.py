"""ImageReward: a general preference score of a picture for its prompt, from a network that reads both together.

Xu et al., "ImageReward: learning and evaluating human preferences for text-to-image generation", 2023, section 3:
BLIP's ViT-L/16 encodes the picture, and BLIP's BERT reads the prompt with cross-attention to it. Five linear layers map
its first token to a number, normalised by the mean and deviation of the training set: about -2 to 2.

Weights: ImageReward.pt of `THUDM/ImageReward` (or the same tensors as safetensors), with the tokenizer of
`google-bert/bert-base-uncased` in the same folder. The network is transformers' BLIP under other names.
Pixels: shorter edge to 224, bicubic; central square; CLIP's mean and deviation. Text: 35 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alignprop_fast.prompts.limits import CutTexts, TextReader
from alignprop_fast.rewards.aesthetic import FiveLayers
from alignprop_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, at_least_fp32
from alignprop_fast.rewards.weights import (
    DEFAULT,
    RewardLoading,
    check_words,
    filled,
    load_tokenizer,
    read_state,
    weights_file,
)

_TOKENIZER = "google-bert/bert-base-uncased"
_TOKENS = 35
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the scores on the training set
_HEAD = 64  # width of one attention head, in both towers
_VISION, _TEXT = "blip.visual_encoder.", "blip.text_encoder."
# Unused weights from pre-training, and buffers.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", _TEXT + "embeddings.position_ids")
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


class ImageReward(nn.Module):
    """The published network, frozen."""

    def __init__(self, path: str | Path, loading: RewardLoading = DEFAULT) -> None:
        """path: the weights file, or its folder, with the tokenizer in the same folder.

        Raises FileNotFoundError, OSError or ValueError, one line each, if something is missing or damaged.
        """
        super().__init__()
        file = weights_file(Path(path), ("ImageReward",), "ImageReward weights")
        self.tokenizer = load_tokenizer(file.parent, "ImageReward weights", source=_TOKENIZER)
        self._cut = CutTexts([TextReader("ImageReward", self.tokenizer, _TOKENS)], "prompts", one_by_one=1)
        state = _renamed(read_state(file, loading))
        try:
            vision, text = _configs(state)
        except (KeyError, IndexError) as error:
            raise OSError(f"{file} does not contain ImageReward: it lacks {error}; copy the file again") from error
        check_words(self.tokenizer, text["vocab_size"], file.parent, _TOKENIZER)
        self.network = filled(lambda: Network(vision, text), state, file, "ImageReward")
        self.network.vision.to(loading.dtype)
        self.network.text.to(loading.dtype)
        edge = vision["image_size"]
        # Crop like torchvision, which rounds the margin; transformers truncates it.
        self.preprocess = Preprocess(
            shortest_edge=edge, crop=(edge, edge), round_crop=True, mean=CLIP_MEAN, std=CLIP_STD
        )

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size. prompts: B strings, cut to 35 tokens; the log says
        so. Returns scores, fp32, [B].
        """
        self._cut.look_at(prompts)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(images_BCHW.device)
        raw_B1 = self.network(self.preprocess(images_BCHW), tokens["input_ids"], tokens["attention_mask"])
        return (raw_B1.squeeze(-1) - _MEAN) / _STD, {}


class Network(nn.Module):
    """Both towers and the layers that map them to a number."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.mlp = FiveLayers(text["hidden_size"])

    def forward(self, pixels_BCHW: Tensor, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
        dtype = self.vision.post_layernorm.weight.dtype
        image_BNC = self.vision(pixel_values=pixels_BCHW.to(dtype)).last_hidden_state
        # The whole picture is seen, so it needs no mask.
        text = self.text(input_ids=ids_BL, attention_mask=mask_BL, encoder_hidden_states=image_BNC)
        return self.mlp(at_least_fp32(text.last_hidden_state[:, 0]))


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        if name.startswith(_UNUSED):
            continue
        if name.startswith(_VISION):
            name = name.removeprefix(_VISION)
            name = "post_layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
            for theirs, ours in _VISION_NAMES.items():
                name = name.replace(theirs, ours)
            name = "vision." + name
        elif name.startswith(_TEXT):
            name = "text." + name.removeprefix(_TEXT)
        result[name] = tensor
    return result


def _configs(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of `BlipVisionConfig` and `BlipTextConfig`, from the shapes of the weights."""
    patches, places = state["vision.embeddings.patch_embedding.weight"], state["vision.embeddings.position_embedding"]
    words = state["text.embeddings.word_embeddings.weight"]
    vision = {
        "hidden_size": patches.shape[0],
        "intermediate_size": len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": _depth(state, "vision.encoder.layers."),
        "num_attention_heads": patches.shape[0] // _HEAD,
        "image_size": round((places.shape[1] - 1) ** 0.5) * patches.shape[-1],
        "patch_size": patches.shape[-1],
        "layer_norm_eps": 1e-6,
    }
    text = {
        "vocab_size": len(words),
        "hidden_size": words.shape[1],
        "encoder_hidden_size": patches.shape[0],
        "intermediate_size": len(state["text.encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": _depth(state, "text.encoder.layer."),
        "num_attention_heads": words.shape[1] // _HEAD,
        "max_position_embeddings": len(state["text.embeddings.position_embeddings.weight"]),
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "is_decoder": True,  # means only that the layers have cross-attention
    }
    return vision, text


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
