"""A pipeline's folder in the diffusers format: check it, choose its weights, load it."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from alignprop_fast.models import SUPPORTED
from alignprop_fast.models.classes import diffusers_class, library_class
from alignprop_fast.models.load.file_kinds import check_bytes
from alignprop_fast.models.refused import MADE_FROM_OTHERS, why_not
from alignprop_fast.ops.errors import first_line

logger = logging.getLogger(__name__)

LOADING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError)

# Parts whose weights the chain does not use. The other parts are tokenizers and schedulers, which have no weights.
_UNUSED = ("safety_checker", "feature_extractor")
_STEM = "(?:diffusion_pytorch_model|pytorch_model|model)"
_WHOLE = re.compile(rf"{_STEM}(?:\.([A-Za-z]\w*))?\.safetensors")
_SHARDED = re.compile(rf"{_STEM}\.safetensors\.index(?:\.([A-Za-z]\w*))?\.json")
_PICKLE = re.compile(rf"{_STEM}.*\.bin")


@dataclass(frozen=True)
class PipelineLoading:
    """How to load weights: the dtype, and whether .bin files may be read (by torch's restricted unpickler)."""

    dtype: torch.dtype
    allow_pickle: bool


@dataclass(frozen=True)
class Weights:
    """The files of a model to read.

    variant: as in `from_pretrained`, such as "fp16"; None: files without a variant.
    names: paths of the safetensors files within the model; for weights in several files, that of their index.
    pickles: parts of the pipeline that are in .bin files.
    """

    variant: str | None
    names: tuple[str, ...]
    pickles: tuple[str, ...]


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a folder with a pipeline of a supported class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, names a class that is not supported, or diffusers or transformers is too old
            for a class.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no model_index.json: {_instead(folder)}")
    return check_index(file, str(folder))


def _instead(folder: Path) -> str:
    """The remedy for a folder that is not a pipeline's."""
    inner = sorted([*folder.glob("*/model_index.json"), *folder.glob("snapshots/*/model_index.json")])
    files = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".ckpt", ".gguf"))
    if inner:
        return f"give the folder inside it, {inner[0].parent}"
    if (folder / "adapter_config.json").is_file():
        return "it holds a PEFT adapter; give the model that it was trained on"
    if "pytorch_lora_weights.safetensors" in files:
        return "it holds a LoRA; give the model that it was trained on"
    if (folder / "config.json").is_file():
        return "it holds one network; give the top folder of the pipeline that it belongs to"
    if [*folder.glob("*.onnx"), *folder.glob("*/*.onnx")]:
        return "it holds an ONNX model, which cannot be trained; give a model in the diffusers format"
    if files:
        return f"it holds single files; give one of them, such as {folder / files[0]}, with --model-config"
    return "give the top folder of a pipeline that save_pretrained wrote"


def check_index(file: Path, where: str) -> dict[str, Any]:
    """The content of `file`, the model_index.json of the model `where`. Raises ValueError as `read_index`."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: copy or save the model again") from error
    if name in MADE_FROM_OTHERS:
        raise ValueError(
            f"{where} holds a {name}, which {MADE_FROM_OTHERS[name]}: use the text-to-image model that it was made from"
        )
    if name not in SUPPORTED:
        raise ValueError(f"{where} holds a {name}, which {why_not(name)}: use one of {', '.join(SUPPORTED)}")
    diffusers_class(name)
    for part in parts_with_weights(index):
        library_class(*index[part])
    return index


def parts_with_weights(index: Mapping[str, Any]) -> list[str]:
    """Names of the networks of a pipeline that the chain uses."""
    return [
        name
        for name, entry in index.items()
        if _is_class(entry) and not name.startswith(("tokenizer", "scheduler", "image_processor", *_UNUSED))
    ]


def check_tokenizers(index: Mapping[str, Any]) -> None:
    """Raises ValueError if diffusers or transformers is too old for a tokenizer, or lacks a package for it."""
    for name, entry in index.items():
        if name.startswith("tokenizer") and _is_class(entry):
            library_class(*entry)


def _is_class(entry: Any) -> bool:
    match entry:
        case ["diffusers" | "transformers", str()]:
            return True
    return False


def choose_weights(
    files: Iterable[str], parts: Iterable[str], where: str, allow_pickle: bool, wanted: str | None = None
) -> Weights:
    """Choose from a model's files ("unet/config.json"): full weights first, then a variant of them, then pickles.

    Logs one line if the choice is not obvious. `where`: the model, for messages. `wanted`: a variant to take where a
    part has it, or "" for none.

    Raises:
        ValueError: a part has no weights, or only pickles and those are not allowed.
    """
    found: dict[str, dict[str | None, str]] = {}
    pickles = {}
    grouped: dict[str, list[str]] = {part: [] for part in parts}
    for file in files:
        part, _, name = file.partition("/")
        if part in grouped and "/" not in name:
            grouped[part].append(name)
    for part, names in grouped.items():
        matches = [match for name in sorted(names) if (match := _WHOLE.fullmatch(name) or _SHARDED.fullmatch(name))]
        found[part] = {match[1]: f"{part}/{match[0]}" for match in matches}
        if not found[part]:
            pickles[part] = _pickle(part, names, where, allow_pickle)
    held = {part: set(variants) for part, variants in found.items() if part not in pickles}
    variant = _variant(held, where) if wanted is None else wanted or None
    names = [variants.get(variant) or variants[None] for part, variants in found.items() if part not in pickles]
    others = sorted({str(one) for variants in found.values() for one in variants if one not in (None, variant)})
    if wanted is None and variant is None and others:
        logger.warning("%s holds the full weights and a variant (%s): using the full ones", where, ", ".join(others))
    if pickles:
        logger.warning("%s: reading the pickles %s, tensors only", where, ", ".join(pickles.values()))
    return Weights(variant, tuple(names), tuple(pickles))


def _pickle(part: str, names: Sequence[str], where: str, allow_pickle: bool) -> str:
    pickle = next((f"{part}/{name}" for name in sorted(names) if _PICKLE.fullmatch(name)), None)
    if pickle is None and any(name.endswith(".onnx") for name in names):
        raise ValueError(f"the {part} of {where} is an ONNX model, which cannot be trained: give .safetensors files")
    if pickle is None:
        raise ValueError(f"the {part} of {where} has no weights (*.safetensors): copy or download it whole")
    if not allow_pickle:
        raise ValueError(
            f"{where}/{pickle} is a pickle, which could run code when it is loaded: give a model with .safetensors "
            "files, or allow it with --allow-pickle"
        )
    return pickle


def _variant(found: Mapping[str, set[str | None]], where: str) -> str | None:
    """The variant to load if some parts lack full weights: one that all these parts have, "fp16" before others."""
    lacking = {part: variants for part, variants in found.items() if None not in variants}
    if not lacking:
        return None
    common = set.intersection(*lacking.values())
    if not common:
        held = "; ".join(f"{part}: {', '.join(sorted(map(str, one)))}" for part, one in lacking.items())
        raise ValueError(f"{where} has neither full weights nor one variant of all parts ({held}): download it whole")
    variant = min(common, key=lambda one: (one != "fp16", str(one)))
    logger.warning("%s holds no full weights of %s: using the %s variant", where, ", ".join(lacking), variant)
    return variant


def check_weights(folder: Path, weights: Weights) -> None:
    """Check the files before anything large is read.

    Raises:
        ValueError: a file is damaged, or one of several that belong together is missing.
    """
    for name in weights.names:
        file = folder / name
        if not file.name.endswith(".json"):
            check_safetensors(file)
            continue
        try:
            shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: copy or download it again") from error
        for shard in shards:
            if not (file.parent / shard).is_file():
                raise ValueError(f"{file.parent} lacks {shard}, one of {len(shards)} files: copy or download it whole")
            check_safetensors(file.parent / shard)


def check_safetensors(file: Path) -> None:
    """Compare a safetensors file's length with its header.

    Raises:
        ValueError: the file is damaged, for example cut off, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    check_bytes(file)
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({file.stat().st_size} bytes): copy or download it again") from error


def local_weights(folder: Path, parts: Iterable[str], allow_pickle: bool, wanted: str | None = None) -> Weights:
    """Choose the weights of a folder with `choose_weights` and check them."""
    files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    weights = choose_weights(files, parts, str(folder), allow_pickle, wanted)
    check_weights(folder, weights)
    return weights


def check_dense(folder: Path, parts: Iterable[str]) -> None:
    """Raises ValueError if another library saved the denoiser or the VAE quantised."""
    for part in parts:
        file = folder / part / "config.json"
        if part.startswith("text_encoder") or not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        except (ValueError, AttributeError):
            continue  # reading it later reports the error
        if settings:
            raise ValueError(
                f"the {part} of {folder} is quantised ({settings.get('quant_method', 'by another library')}): give the "
                "model in fp16 or bf16 (--base-dtype nf4, int8 or fp8 quantises it)"
            )


def load_folder(
    folder: Path,
    index: Mapping[str, Any],
    weights: Weights,
    dtype: torch.dtype,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The pipeline in a folder, without its safety checker.

    Args:
        index, weights: results of `read_index` and `local_weights`.
        given: parts that are not read from the folder.

    Raises:
        ValueError: the files do not form the pipeline, its weights are quantised, or a tokenizer cannot run here.
    """
    from diffusers import DiffusionPipeline

    check_tokenizers(index)
    check_dense(folder, [part for part in parts_with_weights(index) if part not in given])
    # diffusers must be told again which parts (such as T5) were left out when the folder was saved.
    absent: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}
    if index["_class_name"] == "StableDiffusionPipeline":
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with warnings.catch_warnings():
            # Later versions of diffusers call it `dtype` but still accept the old name.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            return DiffusionPipeline.from_pretrained(
                str(folder),
                torch_dtype=dtype,
                variant=weights.variant,
                use_safetensors=True,
                local_files_only=True,
                **absent,
                **{part: _unpickled(folder / part, index[part], dtype) for part in weights.pickles},
                **given,
            )
    except LOADING_ERRORS as error:
        reason = first_line(error)
        raise ValueError(f"cannot load the pipeline in {folder}: {reason}; save or download it again") from error


def _unpickled(folder: Path, entry: tuple[str, str], dtype: torch.dtype) -> Any:
    """A part from its .bin files; both libraries read them with torch's restricted unpickler."""
    library, class_name = entry
    return getattr(import_module(library), class_name).from_pretrained(
        str(folder), torch_dtype=dtype, use_safetensors=False, local_files_only=True
    )
