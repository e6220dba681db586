"""Operator calls and kept bytes of one evaluation of a denoiser, beside stock diffusers with PEFT. Needs no GPU.

    python -m benchmarks.step.calls --output benchmarks/results/meta/calls.csv
    python -m benchmarks.step.calls --models sdxl --histogram 30

The published architectures at their native sizes on meta tensors, with bf16 weights, adapters of rank 16 in fp32 on the
attention's projections, batch 1: a guided pair, or one sample for FLUX. A call is an operator that computes: neither a
view nor an allocation. The package's own ops run the code that they run on a GPU. Each of their kernels counts as one
call, so an op with three kernels counts as three.

Kept are the bytes that are alive between the forward and the backward pass.

stock: unchanged diffusers and PEFT, each fused attention counted as one call.
products, kernels: the package under `keep`, its LoRA products by PyTorch or by its own kernels. Which of the two runs
on a GPU is measured there, shape by shape.
recompute: the package's kernels, with every block recomputed.
floor: the bytes that a transformer must keep if no product of its blocks runs twice: the inputs of the blocks, the
results of products that are read again, and the attention's output and logsumexp.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alignprop_fast.kernels import launch
from alignprop_fast.models.architectures import NAMES, architecture
from alignprop_fast.models.lean.surgery import products_of, take_ops_out
from alignprop_fast.ops import autotune, backend, group_norm_silu, lora_linear_trials
from alignprop_fast.ops.attention import attention
from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import LiveBytes, apply_options, blocks_of, step_gradients
from benchmarks.provenance import commit
from benchmarks.rows import write_rows

VARIANTS = ("stock", "products", "kernels", "recompute", "floor")
CSRC_KERNELS = 3  # statistics or sums, their join, the pass over x (group_norm_silu_cuda.cu)
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class Calls(TorchDispatchMode):
    """Counts calls by name while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "alignprop_fast":
            self.counts[name] += CSRC_KERNELS
            return None
        if not func.is_view and name not in _ALLOCATIONS:
            self.counts[name] += 1
        out = func(*args, **(kwargs or {}))
        # As a GPU's, unlike the meta device's. A kernel of one pixel is contiguous in both memory formats.
        if name == "convolution" and not (args[0].is_contiguous() and args[1].is_contiguous()):
            return out.contiguous(memory_format=torch.channels_last)
        return out

    def launch(self, kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        """Stands for `kernels.launch.launch`."""
        self.counts[kernel.__name__] += 1

    @property
    def total(self) -> int:
        return self.counts.total()


@contextmanager
def as_on_a_gpu(calls: Calls, products: str) -> Iterator[None]:
    """Inside, ops take meta tensors for a GPU's; their kernels only count. products: of LoRA, "plain" or "triton"."""
    if reason := group_norm_silu._extension_missing("cpu"):
        raise SystemExit(f"csrc/ is not built ({reason}): python -m alignprop_fast.ops.extension")
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (launch, "launch", calls.launch),
            (backend, "backend", lambda x, op: "triton"),
            (lora_linear_trials, "_fastest", partial(_fastest, products)),
            (group_norm_silu, "_why_aten", lambda *tensors: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(mock.patch.dict(autotune._choices, clear=True))
        yield


def _fastest(products: str, direction: str, x: torch.Tensor, layers: Any) -> str:
    return products if all(layer.down is not None for layer in layers) else "plain"


def _fused_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, scale: Any = None, **same: Any
) -> Any:
    """Stands for PyTorch's, which has no fused kernel on the meta device."""
    if attn_mask is not None:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=attn_mask, scale=scale
        )[0]
    return attention(query, key, value, scale)


class Counted(NamedTuple):
    """Calls of one evaluation by name, in the forward pass and in both with gradients in fp32; bytes kept between."""

    forward: Counter[str]
    both: Counter[str]
    kept_bytes: int


def count(name: str, variant: str) -> Counted:
    """One evaluation of a published model. For the floor no call counts, and a UNet has none."""
    model = architecture(name)
    size = model.image_size(None, None)
    cond = model.blank_conditioning(1, not model.has_true_cfg, size)
    x = model.initial_latents(1, size, None, None).requires_grad_()
    timestep, calls, trained = torch.tensor(500.0, device=model.device), Calls(), model.trainable()
    if variant == "floor":
        return Counted(Counter(), Counter(), floor_bytes(model, partial(model.predict, x, timestep, cond)))
    with ExitStack() as stack:
        if variant == "stock":
            take_ops_out(model.denoiser)
            model.denoiser.to(memory_format=torch.contiguous_format)
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _fused_attention))
        else:
            copies = model.adapter_copies()
            trained = copies.stand_ins(trained)
            stack.enter_context(copies.in_place())
            stack.enter_context(as_on_a_gpu(calls, "plain" if variant == "products" else "triton"))
        live = stack.enter_context(LiveBytes())
        stack.enter_context(calls)
        option = BlockOption.RECOMPUTE if variant == "recompute" else BlockOption.KEEP
        with apply_options({"*": option}, blocks_of(model.denoiser, model.step_groups())):
            y = model.predict(x, timestep, cond)
        forward, kept_bytes = calls.counts.copy(), live.live_bytes
        step_gradients(y, [x, *trained], torch.empty_like(y))
    return Counted(forward, calls.counts.copy(), kept_bytes)


class Floor:
    """Adds up what a backward pass without repeated products needs of a forward pass through transformer blocks."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        self.bytes += tensor.numel() * tensor.element_size()

    def block_begins(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 3 and tensor.is_floating_point():
                self.add(tensor)

    def product_ends(self, linear: nn.Module, args: Any, y: torch.Tensor) -> None:
        self.add(y)

    def attention(self, query: torch.Tensor, *rest: Any, **same: Any) -> torch.Tensor:
        """Stands for PyTorch's; with the logsumexp in fp32."""
        o = _fused_attention(query, *rest, **same)
        self.add(o)
        self.bytes += 4 * o[..., 0].numel()
        return o


@torch.no_grad()
def floor_bytes(model: Any, predict: Callable[[], Any]) -> int:
    """The bytes that the blocks of a transformer must keep if none of their products runs twice; 0 for a UNet."""
    groups = model.step_groups()
    if set(groups) != {"transformers"}:
        return 0
    floor = Floor()
    for block in groups["transformers"]:
        block.register_forward_pre_hook(floor.block_begins, with_kwargs=True)
        for linear, kind in products_of(block):
            if kind != "last":  # which only adds to the next block's input
                linear.register_forward_hook(floor.product_ends)
    take_ops_out(model.denoiser)
    with mock.patch.object(F, "scaled_dot_product_attention", floor.attention):
        predict()
    return floor.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--histogram", type=int, default=0, metavar="N", help="also print the N most frequent calls")
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for variant in args.variants:
            found = count(name, variant)
            totals = {"forward": found.forward.total(), "both": found.both.total(), "kept_bytes": found.kept_bytes}
            rows.append({"commit": commit(), "torch": torch.__version__, "model": name, "variant": variant, **totals})
            print(f"{name:>14} {variant:>9}: " + ", ".join(f"{part} {total:,}" for part, total in totals.items()))
            for call, times in found.both.most_common(args.histogram):
                print(f"{times:>10,} {call} (forward {found.forward[call]:,})")
    if args.output:
        write_rows(args.output, rows)


if __name__ == "__main__":
    main()
