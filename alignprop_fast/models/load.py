"""Pipelines from a folder, a single file, the Hub or the package itself, with errors that say what to do."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.models.schedules import DIFFUSION, FLOW, check_scheduler, make_scheduler

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
SCHEDULERS = ("auto", *DIFFUSION, *FLOW)


def load_pipeline(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str = "main",
    scheduler: str = "auto",
    model_config: str | Path | None = None,
) -> Any:
    """A pipeline of one of the classes in SUPPORTED, ready for `DifferentiableSampler`.

    The safety checker goes, every weight is frozen, and the modules are in evaluation mode.

    Args:
        model: a folder in the diffusers format, a single .safetensors file, a Hub id "owner/name", or "demo" for the
            bundled model.
        revision: of a Hub model.
        scheduler: of SCHEDULERS, with the settings of the model's own as far as it knows them; auto: DDIM without
            clipping, and flow-euler for models of flow matching.
        model_config: for a single file: the folder of a model of the same architecture, which gives configurations
            and tokenizers; for SD3 and FLUX also everything but the transformer, for SD and SDXL a VAE that the file
            lacks.

    Raises:
        FileNotFoundError: no such folder, or a folder without `model_index.json`.
        ValueError: an unsupported pipeline class or scheduler, or a file that is damaged or does not fit.
        OSError: a Hub model that cannot be reached.
    """
    source = _resolve(model)
    if isinstance(source, Path) and source.is_file():
        pipe = _from_single_file(source, model_config, dtype)
    elif model_config is not None:
        raise ValueError(f"a model config is for a single .safetensors file: leave it out for {model}")
    else:
        if isinstance(source, Path):
            _check_folder(source)
        pipe = _from_pretrained(source, dtype, revision)
    if type(pipe).__name__ not in SUPPORTED:
        raise ValueError(f"{model} is a {type(pipe).__name__}: use one of {', '.join(SUPPORTED)}")
    _check_complete(pipe, model)
    pipe.scheduler = _scheduler(pipe, scheduler)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipe.to(device)


def load_outline(model: str | Path, dtype: torch.dtype = torch.bfloat16, revision: str = "main") -> Any:
    """The pipeline that `load_pipeline` gives, on the meta device: from its configuration files, without weights.

    Tokenizers are left out, so that it cannot encode prompts.

    Raises:
        As `load_pipeline`.
    """
    source = _resolve(model)
    folder = source if isinstance(source, Path) else _configs_of(source, revision)
    _check_folder(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    try:
        pipe = _outline(folder, index)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read the configuration in {folder}: {_first_line(error)}; copy it again") from error
    pipe.scheduler = _scheduler(pipe, "auto")
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
            # diffusers warns of every cast, also where there is nothing to cast.
            if any(parameter.dtype != dtype for parameter in module.parameters()):
                module.to(dtype)
    return pipe


def _outline(folder: Path, index: dict[str, Any]) -> Any:
    import diffusers

    pipe_class = getattr(diffusers, index["_class_name"])
    parameters = inspect.signature(pipe_class).parameters
    given = [name for name, entry in index.items() if isinstance(entry, list) and name in parameters]
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    parts = {name: _outline_part(folder, name, index.get(name)) for name in (*given, *needed)}
    switches = {"requires_safety_checker": False} if "requires_safety_checker" in parameters else {}
    return pipe_class(**parts, **switches)


def _configs_of(model: str, revision: str) -> Path:
    """The configuration files of a Hub model, in a local folder."""
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "*/config.json", "scheduler/*.json"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # of many kinds, network and Hub alike
        raise OSError(f"cannot get {model} from the Hub: {_first_line(error)}; give the folder of a copy") from error


def _outline_part(folder: Path, name: str, entry: list[str | None] | None) -> Any:
    """One component from its configuration; None for what the chain does not use."""
    library, class_name = entry or (None, None)
    if library not in ("diffusers", "transformers") or name.startswith(("tokenizer", "safety_checker", "feature_ext")):
        return None
    module: Any = __import__(library)
    part_class = getattr(module, str(class_name))
    with torch.device("meta"):
        if library == "transformers":
            if not (folder / name / "config.json").is_file():  # transformers would make do with defaults
                raise OSError(f"no config.json in {folder / name}")
            return part_class(part_class.config_class.from_pretrained(folder / name, local_files_only=True))
        return part_class.from_config(part_class.load_config(folder / name, local_files_only=True))


def _scheduler(pipe: Any, name: str) -> Any:
    supported = DIFFUSION if "unet" in pipe.components else FLOW
    name = supported[0] if name == "auto" else name
    if name not in supported:
        raise ValueError(f"scheduler {name!r} does not fit a {type(pipe).__name__}: use {', '.join(supported)} or auto")
    scheduler = make_scheduler(name, pipe.scheduler.config)
    check_scheduler(scheduler, supported)
    return scheduler


def _resolve(model: str | Path) -> Path | str:
    """A local folder or .safetensors file, or the name of a Hub model."""
    if model == "demo":
        from alignprop_fast.demo import model_path

        return Path(model_path())
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.exists():
        raise ValueError(f"{model} is no .safetensors file: give one, or the folder that holds model_index.json")
    if isinstance(model, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        return model
    raise FileNotFoundError(
        f"no model folder {model}: give a folder in the diffusers format, a .safetensors file, a Hub id such as "
        "owner/name, or demo"
    )


def _check_folder(folder: Path) -> str:
    """Find what is wrong with a folder before anything large is read. Returns the name of its pipeline's class."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no model_index.json: give the top folder of a pipeline saved by save_pretrained"
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: copy or save the model anew") from error
    if name not in SUPPORTED:
        raise ValueError(f"{folder} holds a {name}, which is not supported: use one of {', '.join(SUPPORTED)}")
    for file in sorted(folder.rglob("*.safetensors")):
        check_safetensors(file)
    return name


def check_safetensors(file: Path) -> None:
    """Compare a safetensors file's length with its header.

    Raises:
        ValueError: the file is damaged, for example cut off.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({file.stat().st_size} bytes): copy or download it again") from error


def _from_pretrained(source: Path | str, dtype: torch.dtype, revision: str) -> Any:
    from diffusers import DiffusionPipeline

    local = isinstance(source, Path)
    try:
        with warnings.catch_warnings():
            # Renamed to `dtype` in later versions of diffusers, which still take the old name.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            return DiffusionPipeline.from_pretrained(
                str(source), torch_dtype=dtype, revision=None if local else revision, local_files_only=local
            )
    except _LOADING_ERRORS as error:
        reason = _first_line(error)
        if local:
            raise ValueError(f"cannot load the pipeline in {source}: {reason}; save or download it again") from error
        raise OSError(
            f"cannot load {source} from the Hub: {reason}; give the folder of a copy, such as one made by "
            f"`hf download {source} --local-dir FOLDER`"
        ) from error


def _from_single_file(file: Path, model_config: str | Path | None, dtype: torch.dtype) -> Any:
    import diffusers

    if model_config is None:
        raise ValueError(
            f"{file} holds weights alone: give the folder of a model of the same architecture as the model config "
            "(--model-config FOLDER); its configurations and tokenizers are read"
        )
    config = Path(model_config).expanduser()
    if not config.is_dir():
        raise FileNotFoundError(f"no folder {model_config}: give the folder of a model as the model config")
    check_safetensors(file)
    pipeline_class = getattr(diffusers, _check_folder(config))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            if "transformer" in inspect.signature(pipeline_class).parameters:
                return _with_transformer(pipeline_class, file, config, dtype)
            return _whole_from_file(pipeline_class, file, config, dtype)
    except _LOADING_ERRORS as error:
        raise ValueError(
            f"cannot load {file} with the configurations in {config}: {_first_line(error)}; give the folder of a model "
            "of the same architecture, with the weights of what the file lacks"
        ) from error


def _whole_from_file(pipeline_class: Any, file: Path, config: Path, dtype: torch.dtype) -> Any:
    """SD or SDXL: all weights from the file, only a VAE that it lacks from the folder."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        has_vae = any(name.startswith(("first_stage_model.", "vae.")) for name in stream.keys())  # noqa: SIM118
    parts = {} if has_vae else {"vae": AutoencoderKL.from_pretrained(config / "vae", torch_dtype=dtype)}
    if pipeline_class is StableDiffusionPipeline:
        parts |= {"safety_checker": None, "feature_extractor": None}
    return pipeline_class.from_single_file(
        str(file), config=str(config), local_files_only=True, torch_dtype=dtype, **parts
    )


def _with_transformer(pipeline_class: Any, file: Path, config: Path, dtype: torch.dtype) -> Any:
    """SD3 or FLUX: the transformer from the file, which mostly holds nothing else; the rest from the folder."""
    import diffusers

    index = json.loads((config / "model_index.json").read_text(encoding="utf-8"))
    transformer_class = getattr(diffusers, index["transformer"][1])
    transformer = transformer_class.from_single_file(
        str(file), config=str(config), subfolder="transformer", local_files_only=True, torch_dtype=dtype
    )
    return pipeline_class.from_pretrained(
        str(config), transformer=transformer, local_files_only=True, torch_dtype=dtype
    )


def _check_complete(pipe: Any, model: str | Path) -> None:
    """diffusers leaves weights that a file lacks on the meta device, and a tokenizer without its files knows no words.

    Raises:
        ValueError: one of the two.
    """
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(parameter.is_meta for parameter in part.parameters()):
            raise ValueError(f"the {name} of {model} lacks some of its weights: copy or download it again")
        if name.startswith("tokenizer") and part is not None and len(part) <= len(part.all_special_tokens):
            raise ValueError(f"the {name} of {model} has no vocabulary: copy or download it again")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # diffusers points to a stack trace, which is not shown here.
    lines = [line.partition(" Please check out the root cause")[0] for line in lines]
    return lines[0].rstrip(".:;") if lines else type(error).__name__
