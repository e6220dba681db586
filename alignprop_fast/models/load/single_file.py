"""Load a model from one .safetensors file, with configurations from another model's folder."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import SingleFileComponentError

from alignprop_fast.models.load.file_kinds import Shapes, check_kind, denoiser_names, has_text_encoders
from alignprop_fast.models.load.folder import (
    LOADING_ERRORS,
    PipelineLoading,
    check_safetensors,
    load_folder,
    local_weights,
    parts_with_weights,
    read_index,
)
from alignprop_fast.ops.errors import first_line

logger = logging.getLogger(__name__)

# The width of Black Forest Labs' FLUX.1, the only one at which diffusers splits its fused layers.
_FLUX_WIDTH = 3072


def load_single_file(file: Path, model_config: str | Path | None, loading: PipelineLoading) -> Any:
    """The pipeline of a file, in diffusers' naming or the original release's; `model_config` as in `load_pipeline`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no folder is given, or the file is damaged, is of another kind or does not fit the folder.
    """
    check_safetensors(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is a safetensors file with another ending: rename to {file.stem}.safetensors")
    shapes = _shapes(file)
    kind = check_kind(file, shapes)
    if model_config is None:
        raise ValueError(
            f"{file} holds only weights: give the folder of a model of the same architecture as the model config "
            "(--model-config FOLDER), for its configurations and tokenizers"
        )
    config = Path(model_config).expanduser()
    if not config.is_dir():
        raise FileNotFoundError(f"no folder {model_config}: give the folder of a model as the model config")
    index = read_index(config)
    _check_fit(file, shapes, kind, config, index)
    if kind == "StableDiffusionPipeline":
        _check_prediction(file, shapes, config)
    whole = kind == "StableDiffusionPipeline" and has_text_encoders(shapes)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            return (_whole if whole else _with_denoiser)(file, shapes, config, index, loading)
    except (*LOADING_ERRORS, SingleFileComponentError) as error:
        raise ValueError(
            f"cannot load {file} with the configurations in {config}: {first_line(error)}; give the folder of a model "
            "of the same architecture, with the weights that the file lacks"
        ) from error


def _shapes(file: Path) -> Shapes:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        return {name: stream.get_slice(name).get_shape() for name in stream.keys()}  # noqa: SIM118  # no mapping


def _check_fit(file: Path, shapes: Shapes, kind: str, config: Path, index: Mapping[str, Any]) -> None:
    """Refuse files whose names and shapes show that they would fail late, or load and be wrong."""
    of_config = "StableDiffusionPipeline" if "unet" in index else index["_class_name"]
    if kind != of_config:
        raise ValueError(
            f"{file} holds the denoiser of a {kind}, but {config} a {index['_class_name']}: give the folder of a model "
            "of the same architecture as the model config"
        )
    if kind in ("FluxPipeline", "ChromaPipeline"):
        _check_flux(file, shapes)
    if kind != "StableDiffusionPipeline":
        return
    names = {inner: shapes[name] for name, inner in denoiser_names(shapes).items()}
    first = names.get("input_blocks.0.0.weight") or names.get("conv_in.weight")
    if first and first[1] != 4:
        raise ValueError(
            f"{file} holds a UNet of {first[1]} channels, as for inpainting, which needs a picture beside the "
            "prompt: give the text-to-image model that it was made from"
        )
    is_xl = any(name.startswith(("label_emb.", "add_embedding.")) for name in names)
    if is_xl != ("text_encoder_2" in index):
        raise ValueError(
            f"{file} holds the UNet of {'SDXL' if is_xl else 'SD'}, but {config} is a {index['_class_name']}: give the "
            "folder of a model of the same architecture as the model config"
        )
    seen = next((shape[1] for name, shape in sorted(names.items()) if name.endswith("attn2.to_k.weight")), None)
    wanted = _settings(config / "unet" / "config.json").get("cross_attention_dim")  # in a list, one for each block
    if seen is not None and isinstance(wanted, int) and seen != wanted:
        raise ValueError(
            f"{file} takes text of {seen} channels, but the UNet of {config} takes {wanted} (SD 1 has 768, SD 2 1024, "
            "SDXL 2048): give the folder of a model of the same architecture as the model config"
        )
    has_second = any(name.startswith("conditioner.embedders.1.") for name in shapes)
    if is_xl and has_text_encoders(shapes) and not has_second:
        raise ValueError(f"{file} lacks SDXL's second text encoder: give a whole file, or one with only the UNet")


def _settings(file: Path) -> dict[str, Any]:
    """A part's configuration. Raises ValueError if it is missing or damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is missing or damaged: copy or save the model again") from error


def _check_flux(file: Path, shapes: Shapes) -> None:
    """Raises ValueError if FLUX's fused layers have a width that diffusers does not know."""
    names = [name for name in shapes if name.endswith("single_blocks.0.linear1.weight")]
    if names and shapes[names[0]][1] != _FLUX_WIDTH:
        raise ValueError(
            f"{file} is a FLUX of width {shapes[names[0]][1]} in the original layout, which diffusers reads only at "
            f"width {_FLUX_WIDTH}: give its folder, or the file of its transformer, in the diffusers format"
        )


def _check_prediction(file: Path, shapes: Shapes, config: Path) -> None:
    """Raises ValueError if tensors mark a fine-tune that predicts v and the configuration says otherwise.

    Such a model would draw noise.
    """
    settings = _settings(config / "scheduler" / "scheduler_config.json")
    wanted: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in shapes else {}
    wanted |= {"rescale_betas_zero_snr": True} if "ztsnr" in shapes else {}
    if any(settings.get(name) != value for name, value in wanted.items()):
        raise ValueError(
            f"{file} was trained with other settings than the scheduler of {config} has: copy that folder and put "
            f"{json.dumps(wanted)[1:-1]} into its scheduler/scheduler_config.json"
        )


def _whole(file: Path, shapes: Shapes, config: Path, index: Mapping[str, Any], loading: PipelineLoading) -> Any:
    """SD or SDXL: all weights from the file; a VAE that the file lacks from the folder."""
    import diffusers

    parts: dict[str, Any] = {}
    if not any(name.startswith(("first_stage_model.", "vae.")) for name in shapes):
        weights = local_weights(config, ["vae"], loading.allow_pickle)
        parts["vae"] = diffusers.AutoencoderKL.from_pretrained(
            config / "vae", torch_dtype=loading.dtype, variant=weights.variant
        )
    if index["_class_name"] == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None}
    return getattr(diffusers, index["_class_name"]).from_single_file(
        str(file), config=str(config), local_files_only=True, torch_dtype=loading.dtype, **parts
    )


def _with_denoiser(file: Path, shapes: Shapes, config: Path, index: Mapping[str, Any], loading: PipelineLoading) -> Any:
    """The denoiser from the file, which mostly holds nothing else, and the rest from the folder."""
    import diffusers
    from safetensors.torch import load_file

    part = "unet" if "unet" in index else "transformer"
    others = [one for one in parts_with_weights(index) if one != part]
    weights = local_weights(config, others, loading.allow_pickle)
    logger.warning("%s gives only the %s: the rest comes from %s", file, part, config)
    state, names = load_file(file), denoiser_names(shapes)
    # diffusers recognises the UNet's original layout only by its prefix.
    prefix = "model.diffusion_model." if "input_blocks.0.0.weight" in names.values() else ""
    denoiser = getattr(diffusers, index[part][1]).from_single_file(
        {prefix + inner: state[name] for name, inner in names.items()},
        config=str(config),
        subfolder=part,
        local_files_only=True,
        torch_dtype=loading.dtype,
    )
    return load_folder(config, index, weights, loading.dtype, {part: denoiser})
