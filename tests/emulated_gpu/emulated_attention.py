"""A GPU's fused attention on the emulated one: the same names, shapes and argument lists, by plain operators."""

import functools


def _scores(q, k, scale, bias):
    scores = (q.float() @ k.float().transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is None:
        return scores
    assert bias.shape == scores.shape and all(stride % 8 == 0 for stride in bias.stride()[:3]), "as the kernels demand"
    return scores + bias.float()


def _attention(q, k, v, scale, bias=None):
    """(o, probabilities, logsumexp) of the formula, by plain operators."""
    scores = _scores(q, k, scale, bias)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights @ v.float()).to(q.dtype), weights, lse


def _attention_gradients(g, q, k, v, o, lse, scale, bias=None):
    weights = (_scores(q, k, scale, bias) - lse[..., None]).exp()
    dv = weights.transpose(-2, -1) @ g.float()
    d_weights = g.float() @ v.float().transpose(-2, -1)
    d_scores = weights * (d_weights - (g.float() * o.float()).sum(-1, keepdim=True)) * scale
    return tuple(t.to(q.dtype) for t in (d_scores @ k.float(), d_scores.transpose(-2, -1) @ q.float(), dv))


def fused_attention(faults):
    """Register a GPU's fused attention with its names, shapes and argument lists. Returns the object that keeps it.

    faults: changes to results, by name ("cudnn_backward"): (results, arguments) -> results.
    """
    import torch

    library = torch.library.Library("aten", "IMPL", "CUDA")

    def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        o, _, lse = _attention(q, k, v, scale)
        none, state = q.new_empty(0), q.new_zeros(2, dtype=torch.uint64)
        return o, lse, none, none, q.shape[2], k.shape[2], state, none, none

    def flash_backward(g, q, k, v, o, lse, *rest, scale=None):
        assert lse.shape == q.shape[:-1]
        return _attention_gradients(g, q, k, v, o, lse, scale)

    def efficient(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        o, _, lse = _attention(q, k, v, scale, bias)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        state = q.new_zeros((), dtype=torch.int64)
        return o, padded, state, state

    def efficient_backward(g, q, k, v, bias, o, lse, *rest, scale=None):
        assert lse.shape[-1] % 32 == 0
        return *_attention_gradients(g, q, k, v, o, lse[..., : q.shape[2]], scale, bias), q.new_empty(0)

    def cudnn(
        q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
    ):
        o, _, lse = _attention(q, k, v, scale)
        none, state = q.new_empty(0), q.new_zeros((), dtype=torch.int64)
        return o, lse[..., None], none, none, q.shape[2], k.shape[2], state, state, none

    def cudnn_backward(g, q, k, v, o, lse, *rest, scale=None):
        assert lse.shape == (*q.shape[:-1], 1)
        return _attention_gradients(g, q, k, v, o, lse[..., 0], scale)

    def register(name, end, function):
        @functools.wraps(function)
        def run(*arguments, **options):
            results = function(*arguments, **options)
            fault = faults.get(name + end)
            return results if fault is None else fault(results, arguments)

        library.impl(f"_scaled_dot_product_{name}_attention{end}", run)

    for function in (flash, efficient, cudnn):
        register(function.__name__, "", function)
    for name, function in (("flash", flash_backward), ("efficient", efficient_backward), ("cudnn", cudnn_backward)):
        register(name, "_backward", function)
    return library


def allow_fused_attention():
    """Replace PyTorch's guards, which refuse without a GPU."""
    import torch

    def halves_only(params, debug=False):
        return params.query.dtype in (torch.float16, torch.bfloat16)

    torch.backends.cuda.can_use_cudnn_attention = torch.backends.cuda.can_use_flash_attention = halves_only
    torch.backends.cuda.can_use_efficient_attention = lambda params, debug=False: True
