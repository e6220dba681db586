"""From the names in LoRA files to modules, as paths in diffusers: unet.mid_block.attentions.0. ... .to_q.

A name starts with a prefix for the part of the pipeline. Then comes the path of a layer, in diffusers or in the model's
original release, with dots or underscores between its words. It is looked up among the layers of the given pipeline.
Without a pipeline it is looked up among the layers of the published models (SD 1.x to 3.5, SDXL and FLUX.1 with their
text encoders, FLUX.2, Z-Image and Qwen-Image). Block numbers are then free, because models of other sizes have other
numbers. Two models can give one name to different layers (FLUX.1 and FLUX.2: `single_blocks.0.linear1`); the
proportions of the layer tell them apart. If the shapes tell which published model it is, only its layers count.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from alignprop_fast.demo import model_path
from alignprop_fast.models.lora.factors import Lora
from alignprop_fast.models.lora.keys import listed
from alignprop_fast.models.lora.kohya_names import original_paths
from alignprop_fast.models.lora.targets import denoiser
from alignprop_fast.models.published import is_installed, layers, published_layers

_DENOISER, _T5 = "denoiser", "t5"  # placeholders for parts whose names differ between pipelines
_PREFIXES = {
    "lora_unet_": _DENOISER,
    "lora_transformer_": _DENOISER,
    "lycoris_": _DENOISER,
    "model.diffusion_model.": _DENOISER,
    "diffusion_model.": _DENOISER,
    "unet.": _DENOISER,
    "transformer.": _DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": _T5,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": _T5,
}
_CLIPS = ("clip-l", "clip-g")
_PUBLISHED: dict[str, dict[str, tuple[str, ...]]] = {  # the possible networks of each family and part
    "unet": {"unet": ("sd15", "sdxl"), "text_encoder": _CLIPS, "text_encoder_2": _CLIPS},
    "sd3": {
        "transformer": ("sd35-medium", "sd35-large"),
        "text_encoder": _CLIPS,
        "text_encoder_2": _CLIPS,
        "text_encoder_3": ("t5-xxl",),
    },
    "flux": {"transformer": ("flux-dev",), "text_encoder": _CLIPS, "text_encoder_2": ("t5-xxl",)},
    "flux2": {"transformer": ("flux2-klein-4b", "flux2-klein-9b", "flux2-dev")},
    "z-image": {"transformer": ("z-image",)},
    "qwen-image": {"transformer": ("qwen-image",)},
    "krea2": {"transformer": ("krea2",)},
    "lumina2": {"transformer": ("lumina2",)},
    "sana": {"transformer": ("sana",)},
}
_UNET_LAYERS = 2  # residual layers of a block in every published UNet
_BLOCK = re.compile(r"((?:blocks?|layers|attentions|resnets|refiner)[._])(\d+)")
_IN_DIFFUSERS = re.compile(r"(?:unet|transformer|text_encoder(?:_[23])?)\.(?!.*\.processor\.)[\w.]+")


@dataclass(frozen=True)
class Names:
    """The layers of a pipeline's parts, by their names with underscores: {part: {name: path}}.

    With `any_block`, # replaces the number of a block.
    """

    paths: Mapping[str, Mapping[str, str]]
    any_block: bool
    unet_layers: int = _UNET_LAYERS

    def modules(self, name: str) -> tuple[str, ...]:
        """The modules of a layer in a file, with their part.

        None if there is no such layer; several if the original release joins them in one matrix.
        """
        name = re.sub(r"^(module\.)?(base_model\.model\.)?|(?<=\.)_orig_mod\.", "", name)  # prefixes of wrapped models
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        flat = name.removeprefix(prefix).replace(".", "_").replace("_processor_", "_")
        for kind in [_PREFIXES[prefix]] if prefix else [_DENOISER, "text_encoder", _T5]:
            part = self._part(kind)
            for names in self._spellings(part, flat):
                paths = [path for one in names if (path := self._path(part, one)) is not None]
                if names and len(paths) == len(names):
                    return tuple(f"{part}.{path}" for path in paths)
        return ()

    @property
    def family(self) -> str:
        """A key of `LAYOUTS`. The blocks of FLUX share module names with those of SD3."""
        if "unet" in self.paths:
            return "unet"
        paths = self.paths["transformer"]
        if "double_stream_modulation_img_linear" in paths:
            return "flux2"
        if "transformer_blocks_0_img_mod_1" in paths:
            return "qwen-image"
        if "text_fusion_projector" in paths:
            return "krea2"
        if "time_caption_embed_caption_embedder_1" in paths:
            return "lumina2"
        if "caption_projection_linear_1" in paths:
            return "sana"
        return "flux" if "x_embedder" in paths else "z-image" if "cap_embedder_1" in paths else "sd3"

    def _part(self, kind: str) -> str:
        if kind == _DENOISER:
            return "unet" if "unet" in self.paths else "transformer"
        return (
            max((part for part in self.paths if part.startswith("text_encoder")), default="") if kind == _T5 else kind
        )

    def _spellings(self, part: str, flat: str) -> list[tuple[str, ...]]:
        if part in ("unet", "transformer"):
            spellings = dict.fromkeys((re.sub("_to_out$", "_to_out_0", flat), flat))
            return [original_paths(spelling, self.family, self.unet_layers) for spelling in spellings]
        flat = re.sub("_to_(q|k|v|out)$", r"_\1_proj", flat)
        return [(flat,), (f"text_model_{flat}",)]

    def _path(self, part: str, name: str) -> str | None:
        name, paths = name.replace(".", "_"), self.paths.get(part, {})
        if not self.any_block:
            return paths.get(name)
        numbers = iter(number for _, number in _BLOCK.findall(name))
        path = paths.get(_any_block(name))
        return path and re.sub("#", lambda _: next(numbers), path)


@functools.cache
def published_names(family: str) -> Names:
    """The layers of a family of published models, a key of `_PUBLISHED`."""
    paths: dict[str, list[str]] = {part: [] for part in _PUBLISHED[family]}
    for module in _proportions(family):
        part, _, path = module.partition(".")
        paths[part].append(path)
    return Names({part: _by_name(those) for part, those in paths.items()}, any_block=True)


@functools.cache
def _proportions(family: str) -> Mapping[str, set[Fraction]]:
    """{module, with # for the number of a block: outputs / inputs in the published networks of a family}."""
    found: dict[str, set[Fraction]] = {}
    for part, networks in _PUBLISHED[family].items():
        for path, shape in (layer for network in networks for layer in published_layers(network).items()):
            found.setdefault(f"{part}.{_any_block(path)}", set()).add(Fraction(shape[0], shape[1]))
    return found


def _any_block(path: str) -> str:
    return _BLOCK.sub(r"\1#", path)


def names_of(pipe: Any) -> Names:
    """The layers of a given pipeline."""
    paths = {part: _by_name(those) for part, those in _layers_of(pipe).items()}
    per_block = denoiser(pipe).config.get("layers_per_block", _UNET_LAYERS)
    return Names(paths, any_block=False, unet_layers=per_block if isinstance(per_block, int) else per_block[0])


def families() -> list[str]:
    """The families of published models that the installed diffusers has."""
    return [family for family, parts in _PUBLISHED.items() if all(map(is_installed, parts.get("transformer", ())))]


def family_of(lora: Lora, pipe: Any = None) -> str:
    """The family of a transformer's adapters.

    The pipeline decides. Without one, the family that has more of the module names wins; on a tie, the one with more
    of the shapes. If several fit equally, the answer is the first of these: qwen-image's attention is named as flux's.
    """
    if pipe is not None:
        return names_of(pipe).family
    found = [family for family in families() if "transformer" in _PUBLISHED[family]]
    return max(found, key=lambda family: _fit(lora, family))


def _fit(lora: Lora, family: str) -> tuple[int, int]:
    """How many of the modules a published family has, and how many of the shapes one of its transformers has."""
    known = sum(bool(published_names(family).modules(module)) for module in lora)
    places = {module.removeprefix("transformer."): factors.places for module, factors in lora.items()}
    return known, max(_alike(published_layers(network), places) for network in _PUBLISHED[family]["transformer"])


def _alike(known: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[int, ...]]) -> int:
    return sum(known.get(path) == place for path, place in places.items())


def _layers_of(pipe: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """{part: {path: shape of the weight}}.

    Paths in text encoders contain `text_model`, as in files, though one class of transformers 5 dropped it.
    """
    return {
        part: {
            re.sub(r"^encoder\.layers\.", r"text_model.\g<0>", path): shape for path, shape in layers(network).items()
        }
        for part, network in pipe.components.items()
        if isinstance(network, nn.Module)
    }


def _by_name(paths: Iterable[str]) -> dict[str, str]:
    return {path.replace(".", "_"): path for path in paths}


Places = tuple[int, ...]  # the shape of a layer's weight
Modules = Mapping[str, tuple[str, ...]]  # the modules of each layer in a file, by its name there


def find_modules(places: Mapping[str, Places], file: Path, pipe: Any = None) -> dict[str, tuple[str, ...]]:
    """{a layer's name in the file: its modules}, of the pipeline or of a published family.

    places: the shapes of the file's layers by name, which tell families apart that share a name.

    Raises:
        ValueError: a name matches no module, or different modules in two families.
    """
    found = _read_alone(places, file) if pipe is None else _read_by(names_of(pipe), places)
    unknown = [name for name, modules in found.items() if not modules]
    if pipe is None:
        # Names in diffusers' naming need no model to look them up.
        unknown = [name for name in unknown if not _IN_DIFFUSERS.fullmatch(name)]
    if unknown:
        raise _unknown(unknown, file, pipe)
    return {name: modules or (name,) for name, modules in found.items()}


def _read_by(names: Names, places: Iterable[str]) -> Modules:
    return {name: names.modules(name) for name in places}


def _read_alone(places: Mapping[str, Places], file: Path) -> Modules:
    """The reading of the published family that has the most of the names, then the most of the proportions."""
    readings = {family: _read_by(published_names(family), places) for family in families()}
    ranks = {
        family: (sum(map(bool, modules.values())), _proportional(family, modules, places))
        for family, modules in readings.items()
    }
    first, *others = [readings[family] for family, rank in ranks.items() if rank == max(ranks.values())]
    differ = {name for other in others for name in places if other[name] != first[name]}
    if differ and all(first.values()):
        raise ValueError(
            f"{file} has {listed(differ)}, the name of different layers in several models: load it together with its "
            "model"
        )
    return first


def _proportional(family: str, modules: Modules, places: Mapping[str, Places]) -> int:
    """How many layers have the proportions of their modules in the published models of a family."""
    known = _proportions(family)
    return sum(
        Fraction(*places[name][:2]) in map(sum, product(*(known[_any_block(module)] for module in those)))
        for name, those in modules.items()
        if those
    )


def check_shapes(lora: Lora, file: Path, pipe: Any) -> None:
    """Raises ValueError if factors have another shape than the pipeline's layer.

    Without this check diffusers would widen FLUX's first layer to fit some files.
    """
    layers_of = _layers_of(pipe)
    shapes = {module: layers_of[part][path] for module in lora for part, _, path in [module.partition(".")]}
    wrong = [module for module, factors in lora.items() if factors.places != shapes[module]]
    if wrong:
        raise ValueError(
            f"the adapters in {file} do not fit this model, which has {listed(wrong)} in another shape: {_remedy(pipe)}"
        )


def _remedy(pipe: Any) -> str:
    """What to do about adapters that were made for another model."""
    if str(pipe.config.get("_name_or_path")) == str(model_path()):
        return "they are for the bundled model of before; train them again"
    return "load the model they were made for"


def check_published(lora: Lora, names: Mapping[str, str], file: Path) -> None:
    """If most modules of a part have the shapes of a published network, all modules must be among its layers.

    The networks are those of families that have all of the names. names: of the modules in the file. Raises ValueError
    as `find_modules`.
    """
    networks: dict[str, list[str]] = {}
    found = [family for family in families() if all(map(published_names(family).modules, names.values()))]
    for family in found or families():
        for part, those in _PUBLISHED[family].items():
            networks.setdefault(part, []).extend(those)
    for part in {module.partition(".")[0] for module in lora} & networks.keys():
        places = {m.removeprefix(f"{part}."): f.places for m, f in lora.items() if m.startswith(f"{part}.")}
        known = max(
            (published_layers(network) for network in networks[part]),
            key=lambda shapes: _alike(shapes, places),
        )
        unknown = [names[f"{part}.{path}"] for path in places if path not in known]
        if unknown and 2 * _alike(known, places) > len(places):
            raise _unknown(unknown, file, None)


def _unknown(names: Collection[str], file: Path, pipe: Any) -> ValueError:
    if pipe is not None:
        return ValueError(
            f"the adapters in {file} do not fit this model, which has no layer {listed(names)}: load the model they "
            "were made for"
        )
    return ValueError(
        f"{file} has {listed(names)}, no name of kohya's files, diffusers' or others for a layer of this model: give a "
        "LoRA for Stable Diffusion, SDXL, SD3, FLUX, FLUX.2, Z-Image or Qwen-Image as its trainer saved it"
    )
