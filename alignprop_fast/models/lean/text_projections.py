"""Keys and values of the text, projected once for all denoising steps of a chain.

In a UNet's cross-attention they depend on nothing but the text and the weights, which do not change within a chain. In
the joint attention of SD3 and FLUX there is nothing to keep: the text changes from block to block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

KeysAndValues = tuple[torch.Tensor, ...]


class TextProjections:
    """Keys and values of a text by attention. Inside `in_place` they take the place of products with the same bits.

    text: [K * B, N, C], as the denoiser gets it. by_attention: keys and values, [K * B, N, O] each, without a graph.
    """

    def __init__(self, text: torch.Tensor, by_attention: dict[Any, KeysAndValues]):
        self.text, self.by_attention = text, by_attention

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for pair in self.by_attention.values() for tensor in pair]

    def exchanged(self, others: Mapping[int, torch.Tensor]) -> TextProjections:
        """A copy with some tensors replaced, by their ids."""
        pairs = {a: tuple(others.get(id(t), t) for t in pair) for a, pair in self.by_attention.items()}
        return TextProjections(others.get(id(self.text), self.text), pairs)

    @contextmanager
    def in_place(self, of_any_text: bool = False) -> Iterator[None]:
        """of_any_text: also for other texts of the same shape, to measure a block alone."""
        before = _open.projections, _open.of_any_text
        _open.projections, _open.of_any_text = self, of_any_text
        try:
            yield
        finally:
            _open.projections, _open.of_any_text = before


class _Open(threading.local):
    """Of this thread: the backward pass of a GPU, which replays steps, runs in a thread of its own."""

    projections: TextProjections | None = None
    of_any_text = False


_open = _Open()


def known_projections(attn: Any, text: torch.Tensor) -> KeysAndValues | None:
    """Keys and values of this text, if they are in place."""
    if torch.compiler.is_compiling() or _open.projections is None:
        return None
    known = _open.projections
    same = text.shape == known.text.shape if _open.of_any_text else text is known.text
    return known.by_attention.get(attn) if same else None
