"""Frees what nothing uses any more, in a GPU's memory too."""

import gc
from functools import cache

import torch


def collect_garbage() -> None:
    """Collect garbage, and wait until the current GPU's thread of autograd has let go of its last tensors.

    That thread frees what a node held only after backward() has returned, so memory read right then may count it
    (torch/csrc/autograd/engine.cpp, thread_main). When it has done another node, it has freed the one before.
    """
    if torch.cuda.is_initialized():
        torch.autograd.grad(*_last_in_line(torch.cuda.current_device()), retain_graph=True)
    gc.collect()


@cache
def _last_in_line(device: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, input, gradient), all without bytes, whose node waits for all nodes made later in this Python thread.

    Autograd's thread takes the youngest of its nodes first, and may still have to drop those of a failed backward().
    """
    with torch.inference_mode(False):
        leaf = torch.empty(0, device=f"cuda:{device}", requires_grad=True)
        return leaf.clone(), leaf, torch.empty_like(leaf, requires_grad=False)
