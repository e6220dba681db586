"""Makes a dry run smaller, because an emulated GPU takes minutes for what a GPU does at once."""

from __future__ import annotations

from functools import partial

import torch

from alignprop_fast.generate import cost_table
from alignprop_fast.ops import attention_backends, switched_off
from alignprop_fast.ops.autotune import Candidates
from alignprop_fast.runtime import link_rate
from benchmarks.ops import turns


def make_small() -> None:
    """In this process: no Triton (its interpreter takes seconds per kernel), no autotuning, small buffers."""
    switched_off.switch_off("triton", "a dry run")
    attention_backends.fastest = first
    turns.FLUSH_BYTES = 2**16
    cost_table.link_rate = partial(link_rate, size_bytes=2**16)


def first(problem: str, offered: Candidates, device: torch.device) -> str:
    """Replaces the choice of the fastest."""
    return next(iter(offered))
