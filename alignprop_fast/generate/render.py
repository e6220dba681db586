"""Makes pictures from a chain under a plan: denoises, offloads to host memory as planned, and decodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from alignprop_fast.planner import Plan, lockable_bytes
from alignprop_fast.runtime import (
    Chain,
    HostPool,
    Offloader,
    blocks_of,
    raise_if_changed,
    run_decoder_stage,
    run_penalised_chain,
    versions,
)


@dataclass(frozen=True)
class Rendered:
    """images: [B, 3, H, W] in [0, 1]. latents: the decoded ones, [B, C, h, w]. penalty: the sum over gradient steps."""

    images: torch.Tensor
    latents: torch.Tensor
    penalty: torch.Tensor


class Renderer:
    """Runs the chains of a sampler, and holds what they share: the decoder's blocks and the host memory.

    Args:
        model: an adapter of `models`. If it moves to another device, host memory is locked again.
        host_memory_bytes: what all processes of this computer may lock together; None: half of what is free.
    """

    def __init__(self, model: Any, host_memory_bytes: int | None):
        self.model, self.host_memory_bytes = model, host_memory_bytes
        self.decoder_blocks = blocks_of(model.decoder, model.decoder_groups())
        self._host_pool: HostPool | None = None

    @property
    def host_pool(self) -> HostPool:
        """Host memory for offloaded tensors: one pool for all calls."""
        if self._host_pool is None or self._host_pool.device != self.model.device:
            self._host_pool = HostPool(self.model.device, lockable_bytes(self.host_memory_bytes))
        return self._host_pool

    def render(self, chain: Chain, plan: Plan, x: torch.Tensor) -> Rendered:
        """Run the chain from x [B, C, h, w] and decode its last latents, both under the plan."""
        x, penalty = run_penalised_chain(chain, plan, x, self._offloader(plan))
        model, stage = self.model, plan.decoder
        images = run_decoder_stage(
            model.decode, x, stage.name, stage.options, self.decoder_blocks, model.decode_by_bands
        )
        return Rendered(raise_if_changed(images, partial(versions, [model.decoder])), x, penalty)

    def _offloader(self, plan: Plan) -> Offloader | None:
        if torch.is_grad_enabled():
            self.host_pool.begin_chain()
        return Offloader(self.model.device, self.host_pool) if plan.host_bytes else None
