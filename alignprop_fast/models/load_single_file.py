"""One .safetensors file, as models are passed around, with another model's folder for the configurations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignprop_fast.models.load_folder import (
    LOADING_ERRORS,
    Loading,
    check_safetensors,
    first_line,
    load_folder,
    local_weights,
    parts_with_weights,
    read_index,
)

_UNET = "model.diffusion_model."
# Black Forest Labs' own width of FLUX.1, the only one at which diffusers takes its fused layers apart.
_FLUX_WIDTH = 3072


def load_single_file(file: Path, model_config: str | Path | None, loading: Loading) -> Any:
    """The pipeline of a file, in diffusers' naming or the original release's; `model_config` as in `load_pipeline`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no folder is given, or the file is damaged, of another kind, or does not fit the folder.
    """
    if model_config is None:
        raise ValueError(
            f"{file} holds weights alone: give the folder of a model of the same architecture as the model config "
            "(--model-config FOLDER); its configurations and tokenizers are read"
        )
    config = Path(model_config).expanduser()
    if not config.is_dir():
        raise FileNotFoundError(f"no folder {model_config}: give the folder of a model as the model config")
    check_safetensors(file)
    index, shapes = read_index(config), _shapes(file)
    _check_kind(file, shapes)
    is_flow = "transformer" in index
    if is_flow:
        _check_flux(file, shapes)
    else:
        _check_prediction(file, shapes, config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            return (_with_transformer if is_flow else _whole)(file, shapes, config, index, loading)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"cannot load {file} with the configurations in {config}: {first_line(error)}; give the folder of a model "
            "of the same architecture, with the weights of what the file lacks"
        ) from error


Shapes = Mapping[str, list[int]]


def _shapes(file: Path) -> Shapes:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        return {name: stream.get_slice(name).get_shape() for name in stream.keys()}  # noqa: SIM118  # no mapping


def _check_kind(file: Path, shapes: Shapes) -> None:
    """Refuse by their names what would fail late, or load and be wrong."""
    if any(name.endswith(("scaled_fp8", ".scale_weight", ".weight_scale")) for name in shapes):
        raise ValueError(
            f"{file} holds fp8 weights with scales, which diffusers does not apply: give the file in fp16 or bf16 "
            "(--base-dtype fp8 stores them in fp8)"
        )
    if any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        raise ValueError(
            f"{file} is SDXL's refiner, which draws from a picture beside the prompt: give SDXL itself or a fine-tune"
        )
    if "edm_mean" in shapes:
        raise ValueError(f"{file} is Playground v2.5, whose EDM noise is not supported: give SDXL or a fine-tune of it")
    first = shapes.get(_UNET + "input_blocks.0.0.weight")
    if first and first[1] != 4:
        raise ValueError(
            f"{file} holds a UNet of {first[1]} channels, as for inpainting, which draws from a picture beside the "
            "prompt: give the text-to-image model that it was made from"
        )


def _check_flux(file: Path, shapes: Shapes) -> None:
    """Raises ValueError where FLUX's fused layers are of a width that diffusers does not know."""
    names = [name for name in shapes if name.endswith("single_blocks.0.linear1.weight")]
    if names and shapes[names[0]][1] != _FLUX_WIDTH:
        raise ValueError(
            f"{file} is a FLUX of width {shapes[names[0]][1]} in the original layout, which diffusers reads at "
            f"{_FLUX_WIDTH} alone: give its folder, or the file of its transformer, in the diffusers format"
        )


def _check_prediction(file: Path, shapes: Shapes, config: Path) -> None:
    """Fine-tunes that predict v say so by tensors of these names; a configuration that says otherwise draws noise."""
    settings = json.loads((config / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    wanted: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in shapes else {}
    wanted |= {"rescale_betas_zero_snr": True} if "ztsnr" in shapes else {}
    if any(settings.get(name) != value for name, value in wanted.items()):
        raise ValueError(
            f"{file} was trained with other settings than the scheduler of {config} has: copy that folder and put "
            f"{json.dumps(wanted)[1:-1]} into its scheduler/scheduler_config.json"
        )


def _whole(file: Path, shapes: Shapes, config: Path, index: Mapping[str, Any], loading: Loading) -> Any:
    """SD or SDXL: all weights from the file, only a VAE that it lacks from the folder."""
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


def _with_transformer(file: Path, shapes: Shapes, config: Path, index: Mapping[str, Any], loading: Loading) -> Any:
    """SD3 or FLUX: the transformer from the file, which mostly holds nothing else; the rest from the folder."""
    import diffusers

    others = [part for part in parts_with_weights(index) if part != "transformer"]
    weights = local_weights(config, others, loading.allow_pickle)
    transformer = getattr(diffusers, index["transformer"][1]).from_single_file(
        str(file), config=str(config), subfolder="transformer", local_files_only=True, torch_dtype=loading.dtype
    )
    return load_folder(config, index, weights, loading.dtype, {"transformer": transformer})
