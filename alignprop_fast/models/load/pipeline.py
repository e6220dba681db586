"""Load pipelines from a folder, a single file, the Hub or the package itself, with errors that say what to do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.demo import BUNDLED, model_path
from alignprop_fast.models.architectures import NAMES, published_pipeline
from alignprop_fast.models.casting import cast_weights
from alignprop_fast.models.classes import tokenizer_of
from alignprop_fast.models.load.folder import (
    LOADING_ERRORS,
    PipelineLoading,
    load_folder,
    local_weights,
    parts_with_weights,
    read_index,
)
from alignprop_fast.models.load.hub import fetch, fetch_configs
from alignprop_fast.models.load.made_for import is_hub_id
from alignprop_fast.models.load.single_file import load_single_file
from alignprop_fast.models.schedules import DIFFUSION, FLOW, FLOW_SOLVER, check_family, check_scheduler, make_scheduler
from alignprop_fast.ops.errors import first_line

SCHEDULERS = ("auto", *DIFFUSION, *FLOW)


def load_pipeline(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str = "main",
    scheduler: str = "auto",
    model_config: str | Path | None = None,
    allow_pickle: bool = False,
) -> Any:
    """A pipeline of one of the classes in SUPPORTED, ready for `DifferentiableSampler`.

    It has no safety checker. Every weight is frozen and the modules are in evaluation mode.

    Args:
        model: a folder in the diffusers format, a single .safetensors file, a Hub id "owner/name", or the name of a
            bundled model: "demo", or "demo-twin", which draws in 4 steps without guidance.
        revision: of a Hub model.
        scheduler: one of SCHEDULERS, with those settings of the model's own scheduler that it knows. auto: DDIM without
            clipping; flow-euler for models of flow matching, dpm++2m for SANA.
        model_config: for a single file, the folder of a model of the same architecture. Configurations and tokenizers
            come from there. If the file holds only the denoiser, as most files of SD3 and FLUX do, everything else
            comes from there too. If a whole file of SD or SDXL lacks the VAE, the VAE comes from there.
        allow_pickle: also read .bin files if there is no other file, with torch's restricted unpickler.

    Raises:
        FileNotFoundError: there is no such folder, or it has no `model_index.json`.
        ValueError: the file is of another kind, the pipeline class or scheduler is not supported, or files are damaged,
            not allowed or do not fit.
        OSError: a Hub model cannot be reached.
    """
    source, loading = _resolve(model), PipelineLoading(dtype, allow_pickle)
    if isinstance(source, Path) and source.is_file():
        pipe = load_single_file(source, model_config, loading)
    elif model_config is not None:
        raise _needless_config(model)
    elif isinstance(source, Path):
        index = read_index(source)
        weights = local_weights(source, parts_with_weights(index), allow_pickle, BUNDLED.get(str(model)))
        pipe = load_folder(source, index, weights, dtype)
    else:
        pipe = load_folder(*fetch(source, revision, allow_pickle), dtype)
    _check_complete(pipe, model)
    _make_ready(pipe, scheduler)
    return pipe.to(device)


def load_outline(
    model: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    revision: str = "main",
    scheduler: str = "auto",
    model_config: str | Path | None = None,
) -> Any:
    """The pipeline of `load_pipeline` on the meta device, built from configuration files without weights.

    It has no tokenizers, so it cannot encode prompts. Of a single file, whose names of parts are its author's
    own, the outline is that of the model config.

    Args:
        model: as in `load_pipeline`, or the name of a published architecture (`architectures.NAMES`).
        revision, scheduler, model_config: as in `load_pipeline`.

    Raises:
        As `load_pipeline`; ValueError: a single file without a model config.
    """
    pipe = published_pipeline(model, dtype) if isinstance(model, str) and model in NAMES else None
    if pipe is None:
        folder = _config_folder(model, revision, model_config)
        index = read_index(folder)
        try:
            pipe = _outline(folder, index)
        except LOADING_ERRORS as error:
            raise ValueError(
                f"cannot read the configuration in {folder}: {first_line(error)}; copy it again"
            ) from error
    for module in _make_ready(pipe, scheduler):
        cast_weights(module, dtype)
    return pipe


def _make_ready(pipe: Any, scheduler: str) -> list[torch.nn.Module]:
    """Give the pipeline its scheduler and freeze its networks; returns them."""
    pipe.scheduler = pick_scheduler(pipe, scheduler)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for network in networks:
        network.requires_grad_(False).eval()
    return networks


def _config_folder(model: str | Path, revision: str, model_config: str | Path | None) -> Path:
    """Where the configuration files of a model lie."""
    try:
        source = _resolve(model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; of {', '.join(NAMES)} the name is enough") from error
    if isinstance(source, Path) and source.is_file():
        if model_config is None:
            raise ValueError(f"{model} holds weights alone: give the folder of its configurations as the model config")
        return Path(model_config).expanduser()
    if model_config is not None:
        raise _needless_config(model)
    return source if isinstance(source, Path) else fetch_configs(source, revision)


def _needless_config(model: str | Path) -> ValueError:
    return ValueError(f"a model config is for a single .safetensors file: leave it out for {model}")


def _outline(folder: Path, index: dict[str, Any]) -> Any:
    import diffusers

    pipe_class = getattr(diffusers, index["_class_name"])
    parameters = inspect.signature(pipe_class).parameters
    given = [name for name, entry in index.items() if isinstance(entry, list) and name in parameters]
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    parts = {name: _outline_part(folder, name, index.get(name)) for name in (*given, *needed)}
    settings = {name: entry for name, entry in index.items() if name in parameters and name not in parts}
    switches = {"requires_safety_checker": False} if "requires_safety_checker" in parameters else {}
    return pipe_class(**parts, **{**settings, **switches})


def _outline_part(folder: Path, name: str, entry: list[str | None] | None) -> Any:
    """One component from its configuration; None if the chain does not use it."""
    library, class_name = entry or (None, None)
    if library not in ("diffusers", "transformers") or name.startswith(("tokenizer", "safety_checker", "feature_ext")):
        return None
    module: Any = __import__(library)
    part_class = getattr(module, str(class_name))
    with torch.device("cpu" if name == "scheduler" else "meta"):  # a scheduler computes its numbers at once
        if library == "transformers":
            if not (folder / name / "config.json").is_file():  # without it transformers would use defaults
                raise OSError(f"no config.json in {folder / name}")
            return part_class(part_class.config_class.from_pretrained(folder / name, local_files_only=True))
        return part_class.from_config(part_class.load_config(folder / name, local_files_only=True))


def pick_scheduler(pipe: Any, name: str) -> Any:
    flow = FLOW_SOLVER if type(pipe).__name__ == "SanaPipeline" else FLOW
    supported = DIFFUSION if "unet" in pipe.components else flow
    name = supported[0] if name == "auto" else name
    if name not in supported:
        raise ValueError(f"scheduler {name!r} does not fit a {type(pipe).__name__}: use {', '.join(supported)} or auto")
    check_family(pipe.scheduler, supported)
    scheduler = make_scheduler(name, pipe.scheduler.config)
    check_scheduler(scheduler, supported)
    return scheduler


def _resolve(model: str | Path) -> Path | str:
    """A local folder or file, or the name of a Hub model."""
    if model in BUNDLED:
        return model_path()
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if isinstance(model, str) and is_hub_id(model):
        return model
    raise FileNotFoundError(
        f"no model folder {model}: give a folder in the diffusers format, a .safetensors file, a Hub id such as "
        f"owner/name, {' or '.join(BUNDLED)}"
    )


def _check_complete(pipe: Any, model: str | Path) -> None:
    """Check that no weights and no vocabulary are missing.

    diffusers leaves missing weights on the meta device, and a tokenizer without its files has no vocabulary.

    Raises:
        ValueError: weights, a part or a vocabulary are missing.
    """
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(parameter.is_meta for parameter in part.parameters()):
            raise ValueError(
                f"the {name} of {model} lacks some of its weights: copy or download it again, or give a single file "
                "the model config of its own architecture"
            )
        if name.startswith(("text_encoder", "tokenizer")) and part is None and not name.endswith("_3"):  # SD3's T5
            raise ValueError(f"{model} has no {name}, which encodes the prompts: give a complete model")
        if name.startswith("tokenizer") and part is not None:
            tokenizer = tokenizer_of(part)
            if len(tokenizer) <= len(tokenizer.all_special_tokens):
                raise ValueError(f"the {name} of {model} has no vocabulary: copy or download it again")
