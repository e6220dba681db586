"""Models of the Hugging Face Hub: the files that are needed, in the local cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignprop_fast.models.load.folder import (
    Weights,
    check_index,
    check_tokenizers,
    choose_weights,
    parts_with_weights,
)
from alignprop_fast.ops.errors import first_line


def fetch(model: str, revision: str, allow_pickle: bool) -> tuple[Path, dict[str, Any], Weights]:
    """The local folder of a model "owner/name", its index and its weights, as `load_folder` takes them.

    An unsupported class is refused before anything large is downloaded. Without a network, files downloaded earlier are
    used.

    Raises:
        OSError: the Hub cannot be reached or has no such model.
        ValueError: as `check_index`, `check_tokenizers` and `choose_weights`.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import HfApi, hf_hub_download

    files, offline = None, None
    try:
        files = [sibling.rfilename for sibling in HfApi().model_info(model, revision=revision).siblings or ()]
    except Exception as error:  # network and Hub raise many kinds
        offline = error
    try:
        file = Path(hf_hub_download(model, "model_index.json", revision=revision, local_files_only=files is None))
    except Exception as error:
        raise _unreachable(model, offline or error) from error
    index = check_index(file, model)
    check_tokenizers(index)
    if files is None:
        files = [path.relative_to(file.parent).as_posix() for path in file.parent.glob("*/*")]
    weights = choose_weights(files, parts_with_weights(index), model, allow_pickle)
    try:
        folder = DiffusionPipeline.download(
            model, revision=revision, variant=weights.variant, use_safetensors=None if weights.pickles else True
        )
    except Exception as error:
        raise _unreachable(model, error) from error
    return Path(folder), index, weights


def fetch_configs(model: str, revision: str) -> Path:
    """The configuration files of a Hub model, in a local folder. Raises OSError as `fetch`."""
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "*/config.json", "scheduler/*.json"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise _unreachable(model, error) from error


def _unreachable(model: str, error: Exception) -> OSError:
    return OSError(
        f"cannot load {model} from the Hub: {first_line(error)}; give the folder of a copy, such as one made by "
        f"`hf download {model} --local-dir FOLDER`"
    )
