"""Trains the demo CLIP model by contrast of pictures and captions (Radford et al. 2021, arXiv 2103.00020)."""

from pathlib import Path

import torch
from torch import Tensor

from alignprop_fast.demo.vocabulary import BACKGROUNDS, COUNT_WORDS, THINGS
from alignprop_fast.making.loop import Settings, fit
from alignprop_fast.making.networks import build_clip
from alignprop_fast.making.scenes import to_signed
from alignprop_fast.making.train_unet import tokenize

RETRIEVAL_SIZE = 100


def contrastive_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Symmetric cross entropy of logits [B, B]; pictures whose captions are equal share the target evenly."""
    equal = (tokens[:, None] == tokens[None]).all(-1).float()
    target = equal / equal.sum(1, keepdim=True)
    by_picture = -(target * logits.log_softmax(1)).sum(1)
    by_caption = -(target * logits.t().log_softmax(1)).sum(1)
    return (by_picture.mean() + by_caption.mean()) / 2


def train_clip(
    pictures: Tensor, captions: list[str], heldout: tuple, tokenizer, settings: Settings, folder: Path, seed: int
):
    """Trains on uint8 pictures [N, 3, 64, 64]; returns the averaged `CLIPModel`.

    `heldout` holds pictures and captions that are not trained on; retrieval among them is printed as it goes.
    """
    torch.manual_seed(seed)
    clip = build_clip(tokenizer)
    clip.set_attn_implementation("eager")  # on the CPU the fused attention has a slow backward
    tokens = tokenize(tokenizer, captions)

    def loss_at(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (settings.batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = clip(input_ids=tokens[index], pixel_values=to_signed(pictures[index]))
        return contrastive_loss(output.logits_per_image.float(), tokens[index])

    def on_checkpoint(step: int, averages: dict) -> None:
        accuracy = retrieval_accuracy(averages["clip"], heldout[0], heldout[1], tokenizer)
        print(f"held-out top-1 of {RETRIEVAL_SIZE} captions: {accuracy:.3f}", flush=True)
        if step == settings.steps:
            print("held-out foils:", foil_accuracy(averages["clip"], heldout[0], heldout[1], tokenizer), flush=True)

    return fit({"clip": clip}, loss_at, settings, folder / "clip.pt", seed, on_checkpoint)["clip"]


@torch.no_grad()
def retrieval_accuracy(clip, pictures: Tensor, captions: list[str], tokenizer) -> float:
    """Share of pictures whose own caption scores highest among `RETRIEVAL_SIZE` captions (equal captions count)."""
    hits, total = 0, len(pictures) // RETRIEVAL_SIZE * RETRIEVAL_SIZE
    for start in range(0, total, RETRIEVAL_SIZE):
        part = slice(start, start + RETRIEVAL_SIZE)
        output = clip(input_ids=tokenize(tokenizer, captions[part]), pixel_values=to_signed(pictures[part]))
        best = output.logits_per_image.argmax(1).tolist()
        hits += sum(captions[part][choice] == caption for choice, caption in zip(best, captions[part], strict=True))
    return hits / total


def foil_accuracy(clip, pictures: Tensor, captions: list[str], tokenizer) -> dict[str, float]:
    """How often the true caption beats all captions that differ from it in one respect : count, background, noun."""
    choices = {
        "count": list(COUNT_WORDS.values()),
        "background": list(BACKGROUNDS),
        "noun": sorted({thing.plural for thing in THINGS if not thing.colour}),
    }
    return {name: _foil_accuracy(clip, pictures, captions, tokenizer, words) for name, words in choices.items()}


@torch.no_grad()
def _foil_accuracy(clip, pictures: Tensor, captions: list[str], tokenizer, choices: list[str]) -> float:
    hits = []
    for picture, caption in zip(pictures, captions, strict=True):
        words = caption.split()
        # The background is the last of the choices: "a blue car on a green background".
        places = [place for place, word in enumerate(words) if word in choices]
        if not places or (choices == list(BACKGROUNDS) and words[-1] != "background"):
            continue
        texts = [" ".join([*words[: places[-1]], word, *words[places[-1] + 1 :]]) for word in choices]
        output = clip(input_ids=tokenize(tokenizer, texts), pixel_values=to_signed(picture[None]))
        hits.append(texts[output.logits_per_image.argmax().item()] == caption)
    return sum(hits) / len(hits)
