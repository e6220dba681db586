"""The option of a block: what it keeps from its forward to its backward pass, and where."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

EVERY_SEGMENT = "*"
_OFFLOAD = "+offload"


class BlockOption(StrEnum):
    """From the fastest to the leanest; each is named for what it gives up beside all before it.

    What a grade keeps, by group of blocks, is in `runtime.blocks.KEPT`. Offloaded, what the grade keeps waits in host
    memory. Tables, plans and reports show an option by its text.
    """

    KEEP = "keep"
    NORMS = "norms"
    GEGLU = "geglu"
    QKV = "qkv"
    ATTENTION = "attention"
    RECOMPUTE = "recompute"
    KEEP_OFFLOADED = "keep+offload"
    NORMS_OFFLOADED = "norms+offload"
    GEGLU_OFFLOADED = "geglu+offload"
    QKV_OFFLOADED = "qkv+offload"
    ATTENTION_OFFLOADED = "attention+offload"
    RECOMPUTE_OFFLOADED = "recompute+offload"

    @property
    def offload(self) -> bool:
        """Whether what the block keeps waits in host memory."""
        return self.value.endswith(_OFFLOAD)

    @property
    def grade(self) -> BlockOption:
        """The same option with what it keeps on the device."""
        return BlockOption(self.value.removesuffix(_OFFLOAD))

    @property
    def offloaded(self) -> BlockOption:
        """The same option with what it keeps in host memory."""
        return BlockOption(self.grade.value + _OFFLOAD)

    @classmethod
    def _missing_(cls, value: object) -> BlockOption:
        raise ValueError(f"unknown option {value!r} of a block: use {', '.join(cls)}")


GRADES = tuple(option for option in BlockOption if not option.offload)
Options = Mapping[str, BlockOption]  # by name of a segment; EVERY_SEGMENT stands for those without an entry


def option_of(options: Options, segment: str) -> BlockOption:
    """A segment's option: its own entry, or else the entry "*" for all segments, or else KEEP."""
    return options.get(segment, options.get(EVERY_SEGMENT, BlockOption.KEEP))
