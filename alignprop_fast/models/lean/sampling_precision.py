"""Lower precision or merged adapters for denoising steps without gradient.

The output of such a step is a constant of the gradient's estimator. So rounding it changes the picture a little, and
leaves the gradient through the steps after it that of the picture at hand. Only training rounds: evaluation, and steps
with gradient, are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from alignprop_fast.models.lean.merged_adapters import MergedAdapters
from alignprop_fast.models.lean.quantization import round_linears
from alignprop_fast.ops.rounded_linear import KINDS, Pays, rounding, why_not
from alignprop_fast.ops.rounded_linear_trials import Roofline, pays, pays_by

SAMPLING_PRECISIONS = ("exact", "bf16", *KINDS, "merged")


class SamplingPrecision:
    """A precision other than exact, ready for use on a denoiser.

    bf16: autocast, for a model in fp32. int8, fp8: the large linear layers of the transformer blocks, with weights
    rounded once; convolutions, norms, embeddings, attention, adapters, and the first and last layers stay exact.
    merged: the linear layers with adapters, with weights to which these are added once per chain.

    Attributes:
        name: "bf16", "int8", "fp8" or "merged".
        is_in_place: whether the program is inside `in_place`.
        size_bytes: of the rounded or merged weights, beside those that the model has.

    Args:
        denoiser: on its device; what it runs in 8 bits is frozen.
        blocks: its transformer blocks.

    Raises:
        ValueError: an unknown name, or the device or the model does not have this; the message names what it has.
    """

    def __init__(self, name: str, denoiser: Any, blocks: Sequence[nn.Module]):
        self.name, self.device, self.size_bytes, self.is_in_place = name, denoiser.device, 0, False
        self._pays: Pays = pays
        self._merged: MergedAdapters | None = None
        if name == "bf16":
            if denoiser.dtype != torch.float32:
                raise ValueError(
                    f"sampling_precision bf16 is for fp32 runs, but this one is in {_word(denoiser)}: use exact, or "
                    "int8 or fp8 for less than 16 bits"
                )
            return
        if name == "merged":
            self._merged = MergedAdapters(denoiser)
            self.size_bytes = self._merged.size_bytes
            if not self.size_bytes:
                raise ValueError("sampling_precision merged needs LoRA on linear layers: train adapters, or use exact")
            return
        if name not in KINDS:
            raise ValueError(f"sampling_precision is {name!r}: use {', '.join(SAMPLING_PRECISIONS)}")
        if (reason := why_not(name, self.device)) is not None:
            others = "int8 or exact" if name == "fp8" else "exact"
            raise ValueError(f"sampling_precision {name} does not run on {self.device} ({reason}): use {others}")
        if any(p.requires_grad for block in blocks for n, p in block.named_parameters() if "lora_" not in n):
            raise ValueError(f"sampling_precision {name} needs a frozen base: train adapters, or use exact")
        self.size_bytes = round_linears(blocks, name)

    @classmethod
    def wanted(cls, model: Any, name: str, compiled: bool) -> SamplingPrecision | None:
        """From the options of a sampler, for its model; None if exact.

        Raises:
            ValueError: as for the class, or with compiled blocks.
        """
        if name == "exact":
            return None
        if compiled:
            raise ValueError(f"sampling_precision {name} does not support compiled blocks: leave one of the two out")
        return cls(name, model.denoiser, model.step_groups()["transformers"])

    def decide_by(self, roofline: Roofline) -> None:
        """Run a shape in 8 bits where that is estimated to be faster, for a model on meta tensors."""
        self._pays = partial(pays_by, roofline)

    @property
    def in_graphs(self) -> bool:
        """Whether CUDA graphs may record predictions in this precision; autocast would cast weights only once."""
        return self.name != "bf16"

    def refresh(self) -> None:
        """Take over the present adapters. To be called once per chain."""
        if self._merged is not None:
            self._merged.refresh()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the `with` block the denoiser runs in this precision."""
        self.is_in_place = True
        try:
            with self._context():
                yield
        finally:
            self.is_in_place = False

    def _context(self) -> AbstractContextManager[Any]:
        if self._merged is not None:
            return self._merged.in_place()
        if self.name in KINDS:
            return rounding(self._pays)
        # There is no autocast for meta tensors, so an estimate takes these steps for exact.
        return nullcontext() if self.device.type == "meta" else torch.autocast(self.device.type, torch.bfloat16)


def _word(denoiser: Any) -> str:
    return str(denoiser.dtype).removeprefix("torch.")
