"""Human Preference Score v2 (and v2.1): how likely people are to prefer a picture for its prompt.

Wu et al., "Human Preference Score v2: a solid benchmark for evaluating human preferences of text-to-image synthesis",
2023: score = <f(image), g(prompt)> with the normalised embeddings of a CLIP ViT-H/14 trained on preferences. As in the
published code it is not multiplied by the temperature, so it is about 0.2 to 0.35. v2.1 has other weights.

Weights: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of `xswu/HPSv2`, in open_clip's names (or the same tensors as
safetensors), with the tokenizer of any CLIP model of 77 tokens in the same folder.
Pixels: longer edge to 224, bicubic with antialiasing on float tensors (so edges overshoot; torchvision before 0.17 did
not antialias them); padded with black to a square; CLIP's mean and deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from alignprop_fast.rewards.clip import Similarity
from alignprop_fast.rewards.open_clip_names import to_transformers
from alignprop_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from alignprop_fast.rewards.weights import (
    DEFAULT,
    RewardLoading,
    check_words,
    filled,
    load_tokenizer,
    read_state,
    weights_file,
)

_NAMES = ("HPS_v2.1_compressed", "HPS_v2_compressed")
_TOKENIZER = "openai/clip-vit-large-patch14"
_VISION_HEAD, _TEXT_HEAD = 80, 64  # widths of one attention head in ViT-H/14


class HpsV2(Similarity):
    """The similarity under HPS v2's network; the weights decide the version."""

    def __init__(self, path: str | Path, loading: RewardLoading = DEFAULT) -> None:
        """path: the weights file, or its folder (v2.1 if both are there), with the tokenizer in the same folder.

        Raises FileNotFoundError, OSError or ValueError, one line each, if something is missing or damaged.
        """
        file = weights_file(Path(path), _NAMES, "HPS v2 weights")
        tokenizer = load_tokenizer(file.parent, "HPS v2 weights", source=_TOKENIZER)
        try:
            state = to_transformers(read_state(file, loading))
            config = _config(state)
        except (KeyError, IndexError) as error:
            raise OSError(f"{file} does not contain HPS v2: it lacks {error}; copy the file again") from error
        check_words(tokenizer, config["text_config"]["vocab_size"], file.parent, _TOKENIZER)
        model = filled(lambda: _clip(config), state, file, "HPS v2").to(loading.dtype)
        edge = config["vision_config"]["image_size"]
        super().__init__(model, tokenizer, Preprocess(longest_edge=edge, clip=False, mean=CLIP_MEAN, std=CLIP_STD))


def _clip(config: dict[str, Any]) -> Any:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**config))


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`CLIPConfig`'s values from the shapes of the weights. No shape shows the head widths; ViT-H/14's are used."""
    patches = state["vision_model.embeddings.patch_embedding.weight"]
    places = state["vision_model.embeddings.position_embedding.weight"]
    words = state["text_model.embeddings.token_embedding.weight"]
    vision_width, text_width = patches.shape[0], words.shape[1]
    embedding = state["visual_projection.weight"].shape[0]
    vision = {
        "image_size": round((len(places) - 1) ** 0.5) * patches.shape[-1],
        "patch_size": patches.shape[-1],
        **_tower(state, "vision_model", vision_width, _VISION_HEAD),
    }
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": len(state["text_model.embeddings.position_embedding.weight"]),
        "eos_token_id": len(words) - 1,  # CLIP's last token, where the text is pooled
        "bos_token_id": len(words) - 2,
        "pad_token_id": len(words) - 1,
        **_tower(state, "text_model", text_width, _TEXT_HEAD),
    }
    return {"vision_config": vision, "text_config": text, "projection_dim": embedding}


def _tower(state: Mapping[str, Tensor], prefix: str, width: int, head: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": len(state[f"{prefix}.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": len(
            {name.split(".")[3] for name in state if name.startswith(f"{prefix}.encoder.layers.")}
        ),
        "num_attention_heads": width // head,
        "hidden_act": "gelu",
    }
