"""Remembers text embeddings by prompt, so that the text encoders need not stay on the device while the chain runs."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from alignprop_fast.models.conditioning import Conditioning, PromptBatch
from alignprop_fast.models.pipeline_adapter import text_encoders

logger = logging.getLogger(__name__)

LIMIT_BYTES = 2 * 2**30
_WITH_ACTIVATIONS = 1.1  # times the text encoders' weights; they run one prompt at a time, without gradient


class TextCache:
    """`encode` of a pipeline's adapter, run once for each prompt.

    Every prompt is encoded alone, so that the bits of its embedding do not depend on other prompts. Embeddings are kept
    in host memory, and copied to the device when needed; the least recently used ones are dropped first. Between
    encodings the text encoders are on the CPU (SDXL's take 1.5 GiB in bf16). If they do not fit beside the model (T5
    takes 9 GiB), the frozen weights of the model's blocks move to the CPU while they encode. If the model itself is on
    the CPU, nothing moves and the cache only saves time.

    Args:
        model: an adapter of `models.adapt`.
        room_bytes: () -> bytes that may be allocated on the model's device at the moment.
        limit_bytes: host memory for embeddings; one pair of SDXL takes 0.6 MiB in bf16, of FLUX 4 MiB.
    """

    def __init__(self, model: Any, room_bytes: Callable[[], float] = lambda: math.inf, limit_bytes: int = LIMIT_BYTES):
        self._model, self._room_bytes, self._limit_bytes = model, room_bytes, limit_bytes
        self._told = False
        self._kept: OrderedDict[tuple, Conditioning] = OrderedDict()
        self._kept_bytes = 0
        if self._moves:
            self._move_encoders("cpu")

    @property
    def away(self) -> bool:
        """Whether the text encoders leave the device while the chain runs."""
        return self._model.device.type != "cpu"

    @property
    def _moves(self) -> bool:
        return self.away and self._model.device.type != "meta"

    def encode(self, batch: PromptBatch) -> Conditioning:
        """The result of the adapter's `encode`.

        Raises:
            ValueError: a parameter of the text encoders learns, and would get no gradient from remembered embeddings.
        """
        learns = self._model.text_learns()
        if learns and torch.is_grad_enabled():
            raise ValueError("cache_text remembers embeddings, but a text encoder learns: leave cache_text out")
        if batch.embeddings or learns:  # weights that learn may have changed since
            with self._encoders_on_device():
                return self._model.encode(batch)
        return _joined(self.remember(batch), self._model.device)

    def remember(self, batch: PromptBatch) -> list[Conditioning]:
        """Encode all new prompts in one visit of the text encoders; returns each prompt's embeddings, on the host."""
        negatives: Sequence[str | None] = batch.negative_prompts or [None] * len(batch.prompts)
        pairs = zip(batch.prompts, negatives, strict=True)
        keys = [(prompt, negative, batch.guided, batch.size) for prompt, negative in pairs]
        entries = {key: self._kept[key] for key in keys if key in self._kept}
        missing = [key for key in dict.fromkeys(keys) if key not in entries]
        if missing:
            with self._encoders_on_device():
                entries |= {key: self._encoded(*key) for key in missing}
        for key in entries:
            self._keep(key, entries[key])
        return [entries[key] for key in keys]

    def _encoded(self, prompt: str, negative: str | None, guided: bool, size: tuple[int, int]) -> Conditioning:
        negatives = None if negative is None else [negative]
        entry = self._model.encode(PromptBatch([prompt], negatives, guided, size))
        added = None if entry.added is None else {name: _to_host(tensor) for name, tensor in entry.added.items()}
        return replace(entry, embeds=_to_host(entry.embeds), added=added)

    def _keep(self, key: tuple, entry: Conditioning) -> None:
        if key not in self._kept:
            self._kept_bytes += _bytes(entry)
        self._kept[key] = entry
        self._kept.move_to_end(key)
        while self._kept_bytes > self._limit_bytes and len(self._kept) > 1:
            self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])

    @contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        if not self._moves:
            yield
            return
        device = self._model.device
        aside = [] if _WITH_ACTIVATIONS * self._encoder_bytes() <= self._room_bytes() else self._block_weights()
        if aside and not self._told:
            logger.warning("the text encoders do not fit beside the model: it moves to host memory while they encode")
            self._told = True
        try:
            _move(aside, "cpu")
            self._move_encoders(device)
            yield
        finally:
            self._move_encoders("cpu")
            _move(aside, device)

    def _encoder_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for part in text_encoders(self._model.pipe) for t in part.parameters())

    def _move_encoders(self, device: Any) -> None:
        for part in text_encoders(self._model.pipe):
            part.to(device)

    def _block_weights(self) -> list[torch.Tensor]:
        """Nearly all weights of a frozen model. Adapters stay, because an optimizer may hold views of them."""
        blocks = [block for group in self._model.step_groups().values() for block in group]
        tensors = [t for block in blocks for t in (*block.parameters(), *block.buffers()) if not t.requires_grad]
        return list({id(t): t for t in tensors}.values())


def _move(tensors: Sequence[torch.Tensor], device: Any) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


def _joined(entries: Sequence[Conditioning], device: torch.device) -> Conditioning:
    """Join the conditionings of single prompts; tensors without a row for each branch (positions) are shared."""
    first = entries[0]
    branches = first.branches

    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = len(tensors[0]) == branches
        joined = torch.stack(list(tensors), dim=1).flatten(0, 1) if rows else tensors[0]
        return joined.to(device, non_blocking=True)

    added = first.added and {name: join([(entry.added or {})[name] for entry in entries]) for name in first.added}
    lengths = tuple(length for branch in zip(*(entry.lengths for entry in entries), strict=True) for length in branch)
    return replace(first, embeds=join([entry.embeds for entry in entries]), added=added, lengths=lengths)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _bytes(entry: Conditioning) -> int:
    return sum(t.numel() * t.element_size() for t in (entry.embeds, *(entry.added or {}).values()))
