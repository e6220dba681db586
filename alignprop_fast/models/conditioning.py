"""What a denoiser is conditioned on: the text of a batch of pictures, before and after it is encoded."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

Embeddings = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]
"""Given embeddings by their names in the pipeline's own call, B rows each; in a list if rows differ in length."""


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's input besides latents and time, for K branches (unconditional first): [K * B, ...] each.

    embedded_guidance: the guidance scale, an input of guidance-distilled denoisers; others ignore it.
    lengths: tokens of each row of embeds; the rest of a row is padding. Empty: there is no padding that matters.
    multiple: texts of different lengths are padded to the longest, rounded up to a multiple of it.
    fills: whether the denoiser fills each text up to such a multiple with tokens that count as text (Z-Image).
    """

    embeds: torch.Tensor
    added: Mapping[str, torch.Tensor] | None
    branches: int
    embedded_guidance: float | torch.Tensor = 1.0
    lengths: tuple[int, ...] = ()
    multiple: int = 1
    fills: bool = False

    @property
    def extent(self) -> tuple[int, bool]:
        """All that shapes know of the lengths: tokens of a row, and whether all rows are full of text.

        Texts of one length are not padded, because without padding more implementations of attention serve.
        """
        rounded = [length + -length % self.multiple for length in self.lengths]
        texts = rounded if self.fills else self.lengths
        alike = len(set(texts)) <= 1
        return max(texts if alike else rounded, default=0), alike

    @property
    def recurs(self) -> bool:
        """Whether texts of other lengths have this extent too, so that a recording of the denoiser serves them."""
        return self.extent[0] % self.multiple == 0

    def of_prompts(self) -> "Conditioning":
        """A copy of only the branch with the prompts, if all inputs have a row for each text."""
        rows = len(self.embeds) // self.branches
        added = self.added and {name: tensor[-rows:] for name, tensor in self.added.items()}
        return replace(self, embeds=self.embeds[-rows:], added=added, branches=1, lengths=self.lengths[-rows:])

    def longest(self) -> "Conditioning":
        """A copy whose padding counts as text: no batch of these shapes costs more."""
        return replace(self, lengths=(self.embeds.shape[1],) * len(self.lengths))

    def tensors(self) -> list[torch.Tensor]:
        held = (self.embeds, *(self.added or {}).values(), self.embedded_guidance)
        return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]

    def settings(self) -> Hashable:
        """Everything besides `tensors()`, `branches` and `extent`, which may differ from step to step."""
        guidance = None if isinstance(self.embedded_guidance, torch.Tensor) else self.embedded_guidance
        return guidance, tuple(self.added or ())

    def exchanged(self, others: Mapping[int, torch.Tensor]) -> "Conditioning":
        """A copy with some tensors replaced, by their ids."""
        added = self.added and {name: others.get(id(tensor), tensor) for name, tensor in self.added.items()}
        guidance = others.get(id(self.embedded_guidance), self.embedded_guidance)
        return replace(self, embeds=others.get(id(self.embeds), self.embeds), added=added, embedded_guidance=guidance)

    def cast(self, dtype: torch.dtype) -> "Conditioning":
        """A copy in the denoiser's dtype, because text encoders may have another. Whole numbers stay exact."""
        added = self.added and {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in self.added.items()
        }
        return replace(self, embeds=self.embeds.to(dtype), added=added)


@dataclass(frozen=True)
class PromptBatch:
    """The text of B pictures.

    prompts: B texts. negative_prompts: B texts, or None for none.
    guided: whether the denoiser runs with and without the prompts, in two branches.
    size: (height, width) of the pictures in pixels, an input of SDXL.
    embeddings: used instead of the texts, by the names of `PipelineAdapter.embedding_names`, B rows each.
    """

    prompts: list[str]
    negative_prompts: list[str] | None
    guided: bool
    size: tuple[int, int]
    embeddings: Embeddings = field(default_factory=dict)

    @property
    def has_negative(self) -> bool:
        """Whether there is a negative prompt, as a text or embedded."""
        return self.negative_prompts is not None or "negative_prompt_embeds" in self.embeddings


def padded(texts: Sequence[torch.Tensor], tokens: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Texts [N_i, ...] as rows of one tensor [B, tokens, ...], or longer if one of them is, and their lengths."""
    lengths = tuple(map(len, texts))
    tokens = max(tokens, *lengths)
    return torch.stack([F.pad(text, (0, 0) * (text.ndim - 1) + (0, tokens - len(text))) for text in texts]), lengths
