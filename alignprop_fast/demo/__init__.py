"""The bundled demo: a small text-to-image model, CLIP and a counter for its pictures, prompts, examples."""

from pathlib import Path

_FOLDER = Path(__file__).parent

# Names of the bundled text-to-image models, and the variant of the UNet's weights in `model_path()` that each has.
BUNDLED = {"demo": "", "demo-twin": "twin"}


def model_path() -> Path:
    """Folder of the bundled `StableDiffusionPipeline` (64 x 64 pictures, fp16 safetensors)."""
    return _FOLDER / "model"


def clip_path() -> Path:
    """Folder of the bundled transformers `CLIPModel` and its processor, trained on the same kind of pictures."""
    return _FOLDER / "clip"


def counter_path() -> Path:
    """Folder of the bundled counter of `counter_network.py`, trained on the same kind of pictures."""
    return _FOLDER / "counter"


def prompts_path(heldout: bool = False) -> Path:
    """File with one prompt per line; `heldout=True` gives the prompts that never appear in the training file."""
    return _FOLDER / ("prompts_heldout.txt" if heldout else "prompts.txt")


def pictures_path() -> Path:
    """Folder of example training pictures (PNG, 64 x 64) with `captions.json`, a map from file name to caption."""
    return _FOLDER / "pictures"
