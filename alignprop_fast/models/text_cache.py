"""Text embeddings remembered by prompt, so that the text encoders need not lie on the device while the chain runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

LIMIT_BYTES = 2 * 2**30


class TextCache:
    """`encode` of a pipeline's adapter, run once for each prompt.

    Every prompt is encoded by itself, so that its embedding, to the last bit, does not hang on the prompts beside it.
    Embeddings are kept in host memory, the least recently used going first, and copied to the device when asked for.
    Between encodings the text encoders lie on the CPU: SDXL's take 1.5 GiB in bf16. Where the model itself is on the
    CPU they stay, and what is saved is time.

    Args:
        model: an adapter of `models.adapt`.
        limit_bytes: host memory for embeddings; one pair of SDXL takes 0.6 MiB in bf16, of FLUX 4 MiB.
    """

    def __init__(self, model: Any, limit_bytes: int = LIMIT_BYTES):
        self._model, self._limit_bytes = model, limit_bytes
        self._kept: OrderedDict[tuple, Any] = OrderedDict()
        self._kept_bytes = 0
        self._move("cpu")

    @property
    def away(self) -> bool:
        """Whether the text encoders lie elsewhere while the chain runs."""
        return self._model.device.type != "cpu"

    def encode(
        self, prompts: list[str], negative_prompts: str | list[str] | None, guided: bool, size: tuple[int, int]
    ) -> Any:
        """What the adapter's `encode` gives: the `Conditioning` of B prompts, in the order of the branches."""
        return _joined(self.remember(prompts, negative_prompts, guided, size), self._model.device)

    def remember(
        self, prompts: list[str], negative_prompts: str | list[str] | None, guided: bool, size: tuple[int, int]
    ) -> list[Any]:
        """Encode what is not known yet, in one visit of the text encoders; returns each prompt's own, on the host."""
        negatives = negative_prompts if isinstance(negative_prompts, list) else [negative_prompts] * len(prompts)
        keys = [(prompt, negative, guided, size) for prompt, negative in zip(prompts, negatives, strict=True)]
        entries = {key: self._kept[key] for key in keys if key in self._kept}
        missing = [key for key in dict.fromkeys(keys) if key not in entries]
        if missing:
            self._move(self._model.device)
            entries |= {key: self._encoded(*key) for key in missing}
            self._move("cpu")
        for key in entries:
            self._keep(key, entries[key])
        return [entries[key] for key in keys]

    def _encoded(self, prompt: str, negative: str | None, guided: bool, size: tuple[int, int]) -> Any:
        entry = self._model.encode([prompt], None if negative is None else [negative], guided, size)
        added = None if entry.added is None else {name: _to_host(tensor) for name, tensor in entry.added.items()}
        return replace(entry, embeds=_to_host(entry.embeds), added=added)

    def _keep(self, key: tuple, entry: Any) -> None:
        if key not in self._kept:
            self._kept_bytes += _bytes(entry)
        self._kept[key] = entry
        self._kept.move_to_end(key)
        while self._kept_bytes > self._limit_bytes and len(self._kept) > 1:
            self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])

    def _move(self, device: Any) -> None:
        if self._model.device.type != "cuda":
            return
        for name, part in self._model.pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)


def _joined(entries: Sequence[Any], device: torch.device) -> Any:
    """One conditioning of entries of one prompt each; what has no row for each branch (positions) is common to all."""
    first = entries[0]
    branches = first.branches

    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = len(tensors[0]) == branches
        joined = torch.stack(list(tensors), dim=1).flatten(0, 1) if rows else tensors[0]
        return joined.to(device, non_blocking=True)

    added = first.added and {name: join([entry.added[name] for entry in entries]) for name in first.added}
    return replace(first, embeds=join([entry.embeds for entry in entries]), added=added)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _bytes(entry: Any) -> int:
    return sum(t.numel() * t.element_size() for t in (entry.embeds, *(entry.added or {}).values()))
