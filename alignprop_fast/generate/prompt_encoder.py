"""Makes the denoiser's conditioning from the prompts of a call: checks, encodes and remembers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from alignprop_fast.generate.guidance import Guidance
from alignprop_fast.models.conditioning import Conditioning, Embeddings, PromptBatch
from alignprop_fast.models.text_cache import TextCache
from alignprop_fast.prompts.limits import CutTexts

NegativePrompts = str | list[str] | None


class PromptEncoder:
    """Encodes the prompts of a sampler.

    Args:
        model: an adapter of `models`.
        guidance: of the sampler; it decides whether negative prompts are read.
        size: (height, width) of the pictures in pixels.
        room_bytes: returns the bytes that are free on the device now. If given, prompts are encoded once and
            remembered, and the text encoders are on the CPU in between. None: each call encodes its prompts.
    """

    def __init__(
        self, model: Any, guidance: Guidance, size: tuple[int, int], room_bytes: Callable[[], float] | None = None
    ):
        self.model, self.guidance, self.size = model, guidance, size
        self.cache = None if room_bytes is None else TextCache(model, room_bytes)
        readers = model.text_readers()
        self._cut, self._cut_negative = CutTexts(readers, "prompts"), CutTexts(readers, "negative prompts")

    @property
    def encoders_stay(self) -> bool:
        """Whether the text encoders are on the device while the chain runs."""
        return self.cache is None or not self.cache.away

    def batch(
        self, prompts: str | list[str], negative_prompts: NegativePrompts, embeddings: Embeddings | None
    ) -> PromptBatch:
        """The prompts of a call, checked. The log says once which are longer than the text encoders read.

        Raises:
            ValueError: prompts are not texts, or their numbers differ.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_prompts(prompts, negative_prompts)
        given = embeddings or {}
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts] * len(prompts)
        self.say_what_is_cut(  # only of texts that are read
            () if "prompt_embeds" in given else prompts,
            None if "negative_prompt_embeds" in given else negative_prompts,
        )
        self.model.check_embeddings(given, len(prompts))
        batch = PromptBatch(prompts, negative_prompts, False, self.size, given)
        return replace(batch, guided=self.guidance.is_on(batch.has_negative))

    def encode(self, batch: PromptBatch) -> Conditioning:
        """The conditioning, in the denoiser's dtype."""
        if self.model.reads_text(batch):
            self.model.check_text(may_be_away=self.cache is not None)
        cond = (self.model if self.cache is None else self.cache).encode(batch)
        return replace(cond.cast(self.model.dtype), embedded_guidance=self.guidance.embedded_scale)

    def blank(self, count: int, negative_prompt: str | None) -> Conditioning:
        """A stand-in for `encode` of this many prompts, with its shapes and dtypes, to measure without text."""
        return self.model.blank_conditioning(count, self.guidance.is_on(negative_prompt is not None), self.size)

    def encode_ahead(self, prompts: Sequence[str], negative_prompt: str | None) -> None:
        """Encode and remember these prompts, if prompts are remembered."""
        if self.cache is not None:
            negatives = None if negative_prompt is None else [negative_prompt] * len(prompts)
            guided = self.guidance.is_on(negative_prompt is not None)
            self.cache.remember(PromptBatch(list(prompts), negatives, guided, self.size))

    def say_what_is_cut(self, prompts: Sequence[str], negative_prompts: NegativePrompts) -> None:
        """Log one line if texts are longer than the text encoders read."""
        self._cut.look_at(prompts)
        if self.guidance.is_on(negative_prompts is not None):
            self._cut_negative.look_at(text for text in _as_list(negative_prompts) if text)


def _check_prompts(prompts: list[str], negative_prompts: NegativePrompts) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be a text or a list of texts with at least one entry")
    if not all(isinstance(text, str | None) for text in _as_list(negative_prompts)):
        raise ValueError("negative_prompts must be a text, or a list of them, one for each prompt")
    try:
        "".join(text for text in (*prompts, *_as_list(negative_prompts)) if text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "a prompt is not valid Unicode, perhaps from a terminal with another encoding: use UTF-8"
        ) from error
    if isinstance(negative_prompts, list) and len(negative_prompts) != len(prompts):
        raise ValueError(f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts: give one, or one each")


def _as_list(negative_prompts: NegativePrompts) -> list[str | None]:
    return [*negative_prompts] if isinstance(negative_prompts, list) else [negative_prompts]
