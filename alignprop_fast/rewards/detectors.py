"""Detectors of objects of one kind. They give candidates with scores; several candidates may be the same object.

A detector's `candidates(images)` gives, for each of Q candidates,

    margins_BQ     logit - logit(threshold), fp32: positive if the detector would report it
    same_BQQ       log of the soft "these two are one object", 0 on the diagonal, without gradient; None: never the same
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop_fast.rewards.preprocess import Preprocess, at_least_fp32
from alignprop_fast.rewards.preprocess_owlv2 import Owlv2Preprocess
from alignprop_fast.rewards.user_function import is_function_name, user_function
from alignprop_fast.rewards.weights import DEFAULT, RewardLoading, load_model, load_tokenizer, model_folder, model_type

_THRESHOLD = 0.1  # the score from which transformers' post-processing reports a box
_CANDIDATES = 256  # the best-scored ones; we expect no picture with more objects
_SAME_OVERLAP, _OVERLAP_WIDTH = 0.5, 0.05  # intersection over union at which two boxes are one object, and its softness


@runtime_checkable
class Detector(Protocol):
    """A detector of one kind of object. As an `nn.Module` it is moved to the reward's device."""

    def candidates(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """images_BCHW: [B, 3, H, W] in [0, 1]. Returns margins [B, Q] and log-sameness [B, Q, Q] or None."""
        ...


def load_detector(model: str | Path | None, kind: str, loading: RewardLoading = DEFAULT) -> Detector:
    """The detector of `kind`, for example "apple", in a folder or under a Hub id: OWL-ViT, OWLv2 or a counter like the
    bundled one. None means the bundled one; `module:function` is the user's own, function(kind) -> `Detector`.

    Raises FileNotFoundError, OSError or ValueError, one line each.
    """
    if model is None:
        from alignprop_fast.demo import counter_path

        model = counter_path()
    if is_function_name(str(model)) and not Path(model).exists():
        detector = user_function(str(model), f"detector {str(model)!r}")(kind)
        if not isinstance(detector, Detector):
            raise ValueError(f"{model} returned a {type(detector).__name__}: return a detector with `candidates`")
        return detector
    folder = model_folder(model, "detector", loading)
    found = model_type(folder)
    if found == "alignprop_counter":
        return GridCounter(folder, kind).to(loading.dtype)
    if found not in ("owlvit", "owlv2"):
        raise ValueError(f"{folder} holds a model of type {found!r}; give an OWL-ViT or OWLv2 folder")
    return OpenVocabulary(folder, found, kind, loading)


class OpenVocabulary(nn.Module):
    """OWL-ViT or OWLv2 asked for "a photo of a KIND" (Minderer et al., 2022 and 2023). Weights frozen."""

    def __init__(self, folder: Path, found: str, kind: str, loading: RewardLoading) -> None:
        super().__init__()
        self.preprocess: Callable[[Tensor], Tensor]
        what = "detector"
        if found == "owlv2":
            from transformers import Owlv2ForObjectDetection

            self.preprocess = Owlv2Preprocess.from_folder(folder)
            self.model: Any = load_model(Owlv2ForObjectDetection, folder, what, loading)
        else:
            from transformers import OwlViTForObjectDetection

            self.preprocess = Preprocess.from_folder(folder, OWLVIT_DEFAULTS)
            self.model = load_model(OwlViTForObjectDetection, folder, what, loading)
        length = self.model.config.text_config.max_position_embeddings
        tokens = load_tokenizer(folder, what)(
            [f"a photo of a {kind}"], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        self.register_buffer("ids_1L", tokens["input_ids"], persistent=False)
        self.register_buffer("mask_1L", tokens["attention_mask"], persistent=False)

    ids_1L: Tensor
    mask_1L: Tensor

    def candidates(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Detector`."""
        batch, dtype = len(images_BCHW), self.model.dtype
        found = self.model(
            input_ids=self.ids_1L.expand(batch, -1),
            attention_mask=self.mask_1L.expand(batch, -1),
            pixel_values=self.preprocess(images_BCHW).to(dtype),
        )
        margins_BQ = at_least_fp32(found.logits).squeeze(-1) - math.log(_THRESHOLD / (1 - _THRESHOLD))
        margins_BQ, best_BQ = margins_BQ.topk(min(_CANDIDATES, margins_BQ.shape[1]), dim=1)
        boxes_BQ4 = at_least_fp32(found.pred_boxes.detach()).gather(1, best_BQ[..., None].expand(-1, -1, 4))
        return margins_BQ, log_same_boxes(boxes_BQ4)


class GridCounter(nn.Module):
    """The bundled counter: each of 8 x 8 cells is a candidate."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__()
        from alignprop_fast.demo.counter_network import Counter

        try:
            network = Counter.load(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OSError(f"cannot load the counter in {folder}: {error}; copy it again") from error
        if kind not in network.classes:
            raise ValueError(
                f"the bundled counter does not know {kind!r}, only {', '.join(network.classes)}; give an OWL-ViT or "
                "OWLv2 folder as the reward model"
            )
        self.network, self.index = network.requires_grad_(False).eval(), network.classes.index(kind)
        self.preprocess = Preprocess(exact_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)

    def candidates(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Detector`. The threshold is a probability of one half."""
        pixels_BCHW = self.preprocess(images_BCHW).to(self.network.head.weight.dtype)
        return at_least_fp32(self.network(pixels_BCHW)[:, self.index].flatten(1)), None


# Defaults of transformers' OwlViTImageProcessor for keys missing in the file.
OWLVIT_DEFAULTS = {
    "size": {"height": 768, "width": 768},
    "do_center_crop": False,
    "crop_size": {"height": 768, "width": 768},
}


def log_same_boxes(boxes_BQ4: Tensor) -> Tensor:
    """log sigmoid((IoU - 0.5) / 0.05) of boxes (centre x, centre y, width, height); 0 on the diagonal."""
    low_BQ2, high_BQ2 = (boxes_BQ4[..., :2] + sign * boxes_BQ4[..., 2:] / 2 for sign in (-1, 1))
    sides_BQQ2 = (
        torch.minimum(high_BQ2[:, :, None], high_BQ2[:, None]) - torch.maximum(low_BQ2[:, :, None], low_BQ2[:, None])
    ).clamp_min(0)
    shared_BQQ, area_BQ = sides_BQQ2.prod(-1), boxes_BQ4[..., 2:].prod(-1)
    overlap_BQQ = shared_BQQ / (area_BQ[:, :, None] + area_BQ[:, None] - shared_BQQ).clamp_min(1e-9)
    log_same_BQQ = F.logsigmoid((overlap_BQQ - _SAME_OVERLAP) / _OVERLAP_WIDTH)
    return log_same_BQQ.masked_fill(torch.eye(boxes_BQ4.shape[1], dtype=torch.bool, device=boxes_BQ4.device), 0.0)
