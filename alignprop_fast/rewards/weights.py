"""Weights of published rewards: transformers folders, and the bare state dicts that papers publish.

Safetensors are always read. Pickled files (.pt, .pth, .bin) can run code when loaded. So they are read only if the user
allows it, and only by torch's restricted unpickler, which accepts nothing but tensors and containers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_fast.ops.errors import first_line

PICKLES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class RewardLoading:
    """How to load weights. dtype: of the networks; their small last layers (heads, scales) stay fp32."""

    allow_pickle: bool = False
    dtype: torch.dtype = torch.float32


DEFAULT = RewardLoading()


def model_folder(model: str | Path, what: str, loading: RewardLoading = DEFAULT) -> Path:
    """The local folder of a transformers model: `model` itself, or a download of the Hub id "owner/name".

    Raises FileNotFoundError or OSError if there is no such folder or id. what: for the message, such as "CLIP model".
    """
    path = Path(model).expanduser()
    if not path.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(model)):
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.txt", "*.safetensors", *(["pytorch_model*.bin"] if loading.allow_pickle else [])]
        try:
            return Path(snapshot_download(str(model), allow_patterns=wanted))
        except Exception as error:  # network and Hub raise many kinds
            raise OSError(f"cannot get the {what} {model} from the Hub: {first_line(error)}; give a folder") from error
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no {what} in {path} (it has no config.json); give a folder in the transformers format, such as one made "
            "by `hf download OWNER/NAME --local-dir FOLDER`"
        )
    return path


def model_type(folder: Path) -> str:
    """`model_type` of the folder's config.json. Raises ValueError if the file is damaged."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}); copy the model again") from error


def load_model(model_class: Any, folder: Path, what: str, loading: RewardLoading = DEFAULT) -> Any:
    """`model_class.from_pretrained(folder)`, frozen, in evaluation mode.

    Raises OSError or ValueError, one line each, also if weights are missing, which transformers would fill with noise.
    """
    pickles = [] if any(folder.glob("*.safetensors")) else sorted(folder.glob("*.bin"))
    if pickles and not loading.allow_pickle:
        raise _pickle_refused(pickles[0])
    try:
        model, report = model_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=not pickles,
            weights_only=True,
            dtype=loading.dtype,
            output_loading_info=True,
        )
    except Exception as error:  # many kinds from many layers, which mean the same to the user
        raise OSError(f"cannot load the {what} in {folder}: {first_line(error)}; copy the model again") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise OSError(f"the {what} in {folder} lacks {len(missing)} weights ({missing[0]}, ...); copy the model again")
    return model.requires_grad_(False).eval()


def load_tokenizer(folder: Path, what: str, source: str | None = None) -> Any:
    """The tokenizer in `folder`. source: a Hub model that has the right one, for the message if it is missing."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in names):  # transformers would make one up
        remedy = "copy the model again"
        if source is not None:
            remedy = f"copy tokenizer.json, tokenizer_config.json and config.json of {source} there"
        raise FileNotFoundError(f"the {what} in {folder} has no tokenizer (tokenizer.json); {remedy}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise OSError(f"cannot load the tokenizer in {folder}: {first_line(error)}; copy the model again") from error


def check_words(tokenizer: Any, words: int, folder: Path, source: str) -> None:
    """Raises ValueError if the tokenizer has more words than the network has embeddings."""
    if len(tokenizer) > words:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} words and the network {words}: copy that of {source} there"
        )


def weights_file(path: Path, names: Sequence[str], what: str) -> Path:
    """`path` itself if it is a file; in a folder the first of `names` (without ending), as safetensors or else pickled.

    Raises FileNotFoundError if there is none.
    """
    path = path.expanduser()
    if path.is_file():
        return path
    for ending in (".safetensors", *PICKLES):
        for name in names:
            if (path / (name + ending)).is_file():
                return path / (name + ending)
    raise FileNotFoundError(
        f"no {what} in {path}; give the file, or a folder with {names[0]}.safetensors (or .pt) in it"
    )


def read_state(file: Path, loading: RewardLoading = DEFAULT) -> dict[str, Tensor]:
    """Names and tensors (on the CPU) of a weights file. A dictionary in {"state_dict": ...} is unwrapped.

    Raises ValueError if a pickled file is not allowed or holds more than tensors, OSError if a file is damaged.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        if not loading.allow_pickle:
            raise _pickle_refused(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:
        raise OSError(f"cannot read the weights in {file}: {first_line(error)}; copy the file again") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} does not contain named tensors only; give the published weights")
    return dict(state)


def filled(build: Callable[[], nn.Module], state: Mapping[str, Tensor], file: Path, what: str) -> Any:
    """The module that `build` makes, with the weights of `state` in fp32, frozen, in evaluation mode.

    It is built on the meta device, so that a large model is allocated only once.
    Raises OSError, naming a weight that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        module = build()
    wanted = module.state_dict()
    wrong = [f"lacks {name}" for name in wanted if name not in state]
    wrong += [f"has {name}, which is unknown" for name in state if name not in wanted]
    wrong += [
        f"has {name} of shape {list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise OSError(f"{file} is not {what}: it {wrong[0]}{f' ({len(wrong)} such faults)' if wrong[1:] else ''}")
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_meta:  # in no state dict; transformers has only one kind
                assert name == "position_ids", name
                part.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    return module.requires_grad_(False).eval()


def _pickle_refused(file: Path) -> ValueError:
    return ValueError(
        f"{file} is a pickle, which could run code when it is loaded: give a .safetensors file, or allow it with "
        "--allow-pickle"
    )
