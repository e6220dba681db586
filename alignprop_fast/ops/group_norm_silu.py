"""group_norm_silu: y = silu(gamma * normalised(x + t) + beta) as one op; gamma and beta never learn.

t is small: a time embedding, the bias of the convolution that made x, or their sum. The bias then costs no pass over x.
It keeps x, t and two numbers per group. Stock autograd also keeps x + t and the norm's output (silu's input).
Here one pass computes both again, because they are affine in x for a given mean and deviation (Wu & He 2018;
Ramachandran 2017). channels_last tensors use csrc/ if it is built; all others use PyTorch's own group norm.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import extension, switched_off
from alignprop_fast.ops.autotune import remembered
from alignprop_fast.ops.backend import Function, is_traced, only_plain

# Elements of one thread block or one task of a CPU thread, and the largest number of pieces of an image.
CHUNK_ELEMENTS = {"cuda": 8192, "cpu": 65536}
MAX_CHUNKS = 512
# For csrc/ on a GPU: channels in a vector, if the channels are a multiple, and vectors or channels in a thread block.
VECTOR, MAX_THREADS = 4, 1024
COMPILED_DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}


def group_norm_silu_reference(
    x: torch.Tensor,
    groups: int,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
    silu: bool = True,
    addend_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch. x: [B, C, H, W]; gamma, beta: [C]; addend_BC: [B or 1, C]."""
    y = F.group_norm(_add(x, addend_BC), groups, gamma, beta, eps)
    return F.silu(y) if silu else y


# groups, gamma, beta, eps and whether there is SiLU. Frozen weights are no arguments of autograd's functions, which
# would look at each for a gradient and save it.
Form = tuple[int, torch.Tensor, torch.Tensor, float, bool]


class _GroupNormSiLU(Function):
    """PyTorch's own kernels, for every memory format, dtype and device."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, t_BC: torch.Tensor | None, form: Form) -> torch.Tensor:
        (b, c, h, w), (groups, gamma, beta, eps, silu) = x.shape, form
        x = x.contiguous(memory_format=_aten_format(x))
        y, mean, rstd = torch.native_group_norm(_add(x, t_BC), gamma, beta, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, t_BC, mean, rstd)
        ctx.form = form
        # Not in place in compiled code, where torch 2.11 returned a gradient of zeros.
        return F.silu(y, inplace=not torch.compiler.is_compiling()) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, t_BC, mean, rstd = ctx.saved_tensors
        (b, c, h, w), (groups, gamma, beta, eps, silu) = x.shape, ctx.form
        u = _add(x, t_BC)
        # native_group_norm_backward reads both tensors in the memory format of one, without a check.
        g = g.contiguous(memory_format=_aten_format(u))
        if silu:
            y = _normalised(u, gamma, beta, mean, rstd, groups, eps)
            g = torch.ops.aten.silu_backward(g, y)
            del y
        dx = torch.ops.aten.native_group_norm_backward(
            g, u, mean, rstd, gamma, b, c, h * w, groups, [True, False, False]
        )[0]
        return dx, _addend_gradient(dx, t_BC) if ctx.needs_input_grad[1] else None, None


class _CompiledGroupNormSiLU(Function):
    """The kernels of csrc/, for x in channels_last. Buffers are allocated here, so that memory meters see them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, t_BC: torch.Tensor | None, form: Form) -> torch.Tensor:
        x, y, statistics = _compiled_forward(x, t_BC, form)
        ctx.save_for_backward(x, t_BC, statistics)
        ctx.form = form
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, t_BC, statistics = ctx.saved_tensors
        _, gamma, beta, _, silu = ctx.form
        dx, moments = torch.empty_like(x), torch.empty_like(statistics)  # two numbers for each group, too
        torch.ops.alignprop_fast.group_norm_silu_backward.default(
            *(_channels_last(g), x, _per_image(t_BC, x), gamma, beta, statistics, silu),
            *(dx, _partial(x, statistics.shape[2]), moments),
        )
        return dx, _addend_gradient(dx, t_BC) if ctx.needs_input_grad[1] else None, None


def _compiled_forward(
    x: torch.Tensor, t_BC: torch.Tensor | None, form: Form
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x in channels_last, y, and mean and rstd [2, B, groups]."""
    x, (groups, gamma, beta, eps, silu) = _channels_last(x), form
    y = torch.empty_like(x)
    statistics = x.new_empty(2, x.shape[0], groups, dtype=torch.float32)
    torch.ops.alignprop_fast.group_norm_silu_forward.default(
        x, _per_image(t_BC, x), gamma, beta, eps, silu, y, statistics, _partial(x, groups)
    )
    return x, y, statistics


def _normalised(
    u: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    eps: float,
) -> torch.Tensor:
    """The norm's output, computed again by the faster of two ways; the affine one rounds too much in 16 bits."""
    b, c, h, w = u.shape
    if not _is_channels_last(u) or u.element_size() == 2:
        return torch.native_group_norm(u, gamma, beta, b, c, h * w, groups, eps)[0]
    scale_BC = rstd.repeat_interleave(c // groups, dim=1) * gamma
    shift_BC = beta - mean.repeat_interleave(c // groups, dim=1) * scale_BC
    return torch.addcmul(shift_BC[:, :, None, None], u, scale_BC[:, :, None, None]).to(u.dtype)


def _add(x: torch.Tensor, t_BC: torch.Tensor | None) -> torch.Tensor:
    return x if t_BC is None else x + t_BC[:, :, None, None]


def _per_image(t_BC: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """One row for each image, as csrc/ reads them. Not kept: what is kept stays as small as the caller made it."""
    return None if t_BC is None else t_BC.expand(x.shape[:2]).contiguous()


def _addend_gradient(dx: torch.Tensor, t_BC: torch.Tensor) -> torch.Tensor:
    return dx.sum((2, 3)).sum_to_size(t_BC.shape)


def _is_channels_last(x: torch.Tensor) -> bool:
    """Whether channels are innermost, also in a view; a tensor of one pixel or channel counts as contiguous."""
    return not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1


def _aten_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format for native_group_norm, which on CUDA supports only the contiguous one."""
    return torch.channels_last if _is_channels_last(x) and not x.is_cuda else torch.contiguous_format


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    # A view that starts inside a vector is copied. (Compiled code has no views with such offsets.)
    if not torch.compiler.is_compiling() and x.storage_offset() % VECTOR:
        return x.clone()
    return x


def _partial(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Workspace for two numbers per image, group and chunk of rows; its shape tells the kernels how to cut the rows."""
    b, c, h, w = x.shape
    return x.new_empty(b, groups, _chunks(h * w, c, x.is_cuda), 2, dtype=torch.float32)


@cache
def _chunks(rows: int, channels: int, on_gpu: bool) -> int:
    wanted = rows * channels // CHUNK_ELEMENTS["cuda" if on_gpu else "cpu"]
    return max(1, min(wanted, rows, MAX_CHUNKS))


@torch.compiler.assume_constant_result
def _extension_missing(device_type: str) -> str | None:
    """`extension.missing`. When the ops are first loaded, it registers fakes for them, which return nothing."""
    reason = extension.missing(device_type)
    if reason is None:
        _register_fakes()
    return reason


@cache
def _register_fakes() -> None:
    @torch.library.register_fake("alignprop_fast::group_norm_silu_forward")
    def _(x, t, gamma, beta, eps, silu, y, statistics, partial):
        return None

    @torch.library.register_fake("alignprop_fast::group_norm_silu_backward")
    def _(g, x, t, gamma, beta, statistics, silu, dx, partial, moments):
        return None


def _why_aten(x: torch.Tensor, *small: torch.Tensor | None) -> str | None:
    """None if csrc/ serves x with gamma, beta and addend `small`, else the reason for PyTorch's kernels."""
    device, channels = x.device.type, x.shape[1]
    if x.dim() != 4 or not _is_channels_last(x) or x.numel() == 0:
        return "x is not channels_last"
    if x.dtype not in COMPILED_DTYPES.get(device, ()):
        return f"no kernel for {x.dtype} on {device}"
    if any(t is not None and t.dtype != x.dtype for t in small):
        return "the weights have another dtype than x"
    if x.is_cuda and channels // (1 if channels % VECTOR else VECTOR) > MAX_THREADS:
        return f"rows of {channels} channels are too wide"
    return switched_off.reason("group_norm_silu.csrc") or _extension_missing(device)


def backend(x: torch.Tensor, *small: torch.Tensor | None) -> str:
    """The implementation for x with `small` as in `_why_aten`: "csrc", or "aten: " and the reason.

    It looks once at each shape. It may build the kernels for a CUDA tensor.
    """
    if is_traced(x):
        return _implementation(x, *small)
    key = ["group_norm_silu", x.dtype, x.shape, x.stride()]
    for t in small:
        key.append(None if t is None else t.dtype)
    return remembered(tuple(key), _implementation, x.device, x, *small)


def _implementation(x: torch.Tensor, *small: torch.Tensor | None) -> str:
    reason = _why_aten(x, *small)
    return "csrc" if reason is None else f"aten: {reason}"


def group_norm_silu(
    x: torch.Tensor,
    groups: int,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    addend_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(group_norm(x + addend)), differentiable in x and the addend; keeps x, the addend, mean and deviation.

    Args:
        x: [B, C, H, W] in any memory format; channels_last stays channels_last (on CUDA: if csrc/ is built).
        groups: divides C.
        gamma, beta: [C], frozen: they get no gradient.
        eps: added to the variance.
        silu: False leaves the activation out.
        addend_BC: [B, C] or [1, C], added to every pixel before the norm.

    Returns:
        [B, C, H, W] in x's dtype.
    """
    if only_plain(x):
        return group_norm_silu_reference(x, groups, gamma, beta, eps, silu, addend_BC)
    t_BC = None if addend_BC is None else addend_BC.to(x.dtype).contiguous()
    form = groups, gamma.contiguous(), beta.contiguous(), eps, silu
    if backend(x, gamma, beta, t_BC) != "csrc":
        return _GroupNormSiLU.apply(x, t_BC, form)
    if torch.is_grad_enabled():
        return _CompiledGroupNormSiLU.apply(x, t_BC, form)
    return _compiled_forward(x, t_BC, form)[1]
