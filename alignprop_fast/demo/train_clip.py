"""Trains the demo CLIP model by contrast of pictures and captions (Radford et al. 2021, arXiv 2103.00020)."""

from pathlib import Path

import torch
from torch import Tensor

from alignprop_fast.demo.loop import Settings, fit
from alignprop_fast.demo.networks import build_clip
from alignprop_fast.demo.scenes import to_signed
from alignprop_fast.demo.train_unet import tokenize

RETRIEVAL_SIZE = 100


def contrastive_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Symmetric cross entropy of logits [B, B]; pictures whose captions are equal share the target evenly."""
    equal = (tokens[:, None] == tokens[None]).all(-1).float()
    target = equal / equal.sum(1, keepdim=True)
    by_picture = -(target * logits.log_softmax(1)).sum(1)
    by_caption = -(target * logits.t().log_softmax(1)).sum(1)
    return (by_picture.mean() + by_caption.mean()) / 2


def train_clip(pictures: Tensor, captions: list[str], heldout, tokenizer, settings: Settings, folder: Path, seed: int):
    """Trains on uint8 pictures [N, 3, 64, 64]; returns the averaged `CLIPModel`.

    `heldout` holds pictures and captions that are not trained on; retrieval among them is printed as it goes.
    """
    torch.manual_seed(seed)
    clip = build_clip(tokenizer)
    tokens = tokenize(tokenizer, captions)

    def loss_at(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (settings.batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = clip(input_ids=tokens[index], pixel_values=to_signed(pictures[index]))
        return contrastive_loss(output.logits_per_image.float(), tokens[index])

    def on_checkpoint(step: int, averages: dict) -> None:
        accuracy = retrieval_accuracy(averages["clip"], *heldout, tokenizer)
        print(f"clip held-out top-1 of {RETRIEVAL_SIZE} captions: {accuracy:.3f}", flush=True)

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
