"""The steps and scales of guidance that a model was made for, read from its configuration without torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MadeFor:
    """is_distilled: whether the model learned to draw without guidance. true_cfg_scale: above 1, that alone guides."""

    steps: int
    guidance_scale: float
    is_distilled: bool = False
    true_cfg_scale: float = 1.0


_USUAL = MadeFor(50, 5.0)
_Z_IMAGE_TURBO = MadeFor(8, 0.0, is_distilled=True)
_KLEIN = MadeFor(4, 1.0, is_distilled=True)
_KLEIN_BASE = _FLUX2_DEV = MadeFor(50, 4.0)
_KREA2, _KREA2_DISTILLED = MadeFor(28, 4.5), MadeFor(8, 0.0, is_distilled=True)
_QWEN_IMAGE = MadeFor(50, 1.0, true_cfg_scale=4.0)
_CHROMA = MadeFor(35, 5.0)
_LUMINA2 = MadeFor(30, 4.0)
_SANA = MadeFor(20, 4.5)
_BY_NAME = {
    "demo": MadeFor(12, 2.0),
    "demo-twin": MadeFor(4, 1.0, is_distilled=True),
    "z-image-turbo": _Z_IMAGE_TURBO,
    "flux2-klein-4b": _KLEIN,
    "flux2-klein-9b": _KLEIN,
    "flux2-dev": _FLUX2_DEV,
    "qwen-image": _QWEN_IMAGE,
    "krea2": _KREA2,
    "chroma": _CHROMA,
    "lumina2": _LUMINA2,
    "sana": _SANA,
}
_BY_CLASS = {  # as it is, and with `is_distilled` in its index
    "Flux2KleinPipeline": (_KLEIN_BASE, _KLEIN),
    "Flux2Pipeline": (_FLUX2_DEV, _FLUX2_DEV),
    "Krea2Pipeline": (_KREA2, _KREA2_DISTILLED),
    "QwenImagePipeline": (_QWEN_IMAGE, _QWEN_IMAGE),
    "ChromaPipeline": (_CHROMA, _CHROMA),
    "Lumina2Pipeline": (_LUMINA2, _LUMINA2),
    "SanaPipeline": (_SANA, _SANA),
}


def made_for(model: str, model_config: str | None = None) -> MadeFor:
    """The settings for a model, given as in `load_pipeline` or `load_outline`.

    Of a Hub model the configuration files are fetched. What cannot be read has the usual settings; loading it says
    what is wrong.

    Raises:
        OSError: a Hub model cannot be reached.
    """
    if model in _BY_NAME:
        return _BY_NAME[model]
    folder = Path(model_config or model).expanduser()
    if model_config is None and not folder.exists() and is_hub_id(model):
        from alignprop_fast.models.load.hub import fetch_configs

        folder = fetch_configs(model, "main")
    return _of_folder(folder)


def _of_folder(folder: Path) -> MadeFor:
    index = _read(folder / "model_index.json")
    name = str(index.get("_class_name"))  # of a pipeline of the user's own a list
    if name == "ZImagePipeline":
        return _z_image(folder)
    usual, distilled = _BY_CLASS.get(name, (_USUAL, _USUAL))
    return distilled if index.get("is_distilled") else usual


def _z_image(folder: Path) -> MadeFor:
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    # Z-Image has shift 6.
    is_turbo = scheduler.get("shift") == 3 and not scheduler.get("use_dynamic_shifting")
    return _Z_IMAGE_TURBO if is_turbo else _USUAL


def is_hub_id(model: str) -> bool:
    """Whether the text has the form of a Hub id, owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
