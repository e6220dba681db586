"""Trains the demo counter on composed scenes: from pictures and how many things of each kind they hold, no places.

    python -m alignprop_fast.making.train_counter --data node_modules --output-dir demo-run

Uses the pictures of `train.py` (same folder, same seeds) and writes `counter/` to the output folder. A stopped run
continues where it was: give the same command.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_fast.demo.counter_network import CLASSES, Counter, soft_counts
from alignprop_fast.making.loop import Settings, fit
from alignprop_fast.making.scenes import random_scene, to_signed
from alignprop_fast.making.train import HELDOUT_SEED, NUM_HELDOUT, NUM_PICTURES, SEED, load_pictures

SETTINGS = Settings(
    steps=1500, batch_size=32, learning_rate=2e-3, weight_decay=0.05, average_decay=0.99, checkpoint_every=250
)


def true_counts(number: int, seed: int) -> Tensor:
    """[number, classes], the things in the scenes that `make_pictures(_, number, seed)` draws."""
    counts = torch.zeros(number, len(CLASSES))
    for index in range(number):
        for thing in random_scene(random.Random(f"{seed}:{index}")).things:
            counts[index, CLASSES.index(thing.noun)] += 1
    return counts


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [B, 3, 64, 64] -> [-1, 1], some of them blurred and noisy, as a small autoencoder paints them."""
    pixels_BCHW = to_signed(pictures)
    batch = len(pixels_BCHW)
    coarse_BCHW = F.interpolate(F.avg_pool2d(pixels_BCHW, 2), scale_factor=2, mode="bilinear")
    mix_B, noise_B = torch.rand(2, batch, 1, 1, 1, generator=generator).unbind()
    pixels_BCHW = torch.lerp(pixels_BCHW, coarse_BCHW, mix_B.clamp_min(0.3) - 0.3)
    noise_BCHW = torch.randn(pixels_BCHW.shape, generator=generator)
    shift_B311 = 0.05 * torch.randn(batch, 3, 1, 1, generator=generator)
    mirrored_B = torch.rand(batch, generator=generator) < 0.5
    pixels_BCHW = torch.where(mirrored_B[:, None, None, None], pixels_BCHW.flip(-1), pixels_BCHW)
    return (pixels_BCHW + 0.15 * noise_B.square() * noise_BCHW + shift_B311).clamp(-1, 1)


@torch.no_grad()
def accuracy(counter: Counter, pictures: Tensor, counts: Tensor) -> dict[str, float]:
    """Shares of pictures: all classes counted right (rounded), all of those present, and the mean absolute error."""
    found = torch.cat([soft_counts(counter(to_signed(part))) for part in pictures.split(250)])
    right = found.round() == counts
    present = counts > 0
    return {
        "pictures with every class right": right.all(1).float().mean().item(),
        "pictures with the classes present right": (right | ~present).all(1).float().mean().item(),
        "mean absolute error of classes present": (found - counts)[present].abs().mean().item(),
    }


def train_counter(data: Path, folder: Path, settings: Settings = SETTINGS) -> Counter:
    """The averaged counter; its accuracy on pictures that were not trained on is printed as it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, _ = load_pictures(data, folder, NUM_PICTURES, SEED)
    heldout, _ = load_pictures(data, folder, NUM_HELDOUT, HELDOUT_SEED)
    counts, heldout_counts = true_counts(len(pictures), SEED), true_counts(len(heldout), HELDOUT_SEED)
    torch.manual_seed(SEED)
    counter = Counter().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_at(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (settings.batch_size,), generator=generator)
        pixels_BCHW = augmented(pictures[index], generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BCHW = counter(pixels_BCHW)
        # Poisson's likelihood: 19 of 20 kinds are absent, and with an absolute error nothing is ever counted at all.
        found_BC = soft_counts(logits_BCHW.float())
        return F.poisson_nll_loss(found_BC, counts[index], log_input=False, reduction="none").sum(1).mean()

    def on_checkpoint(step: int, averages: dict) -> None:
        print(step, accuracy(averages["counter"], heldout, heldout_counts), flush=True)

    return fit({"counter": counter}, loss_at, settings, folder / "counter.pt", SEED, on_checkpoint)["counter"]  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("node_modules"), help="folder of the npm packages")
    parser.add_argument("--output-dir", type=Path, required=True, help="pictures, checkpoint and the result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train_counter(arguments.data, arguments.output_dir).save(arguments.output_dir / "counter")


if __name__ == "__main__":
    main()
