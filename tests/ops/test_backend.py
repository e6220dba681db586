"""If a kernel fails, forward or backward, the user sees one line and gets plain PyTorch's result.

Tests replace the kernels by functions that fail. On a GPU, and on the emulated one, everything else is real.
"""

import logging
import subprocess

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources, PTXASError

from alignprop_fast.kernels import activation as activation_kernels
from alignprop_fast.kernels import attention as attention_kernels
from alignprop_fast.kernels import guided_step as guided_step_kernels
from alignprop_fast.kernels import lora_linear as lora_kernels
from alignprop_fast.kernels import lora_linear_backward as backward_of_lora
from alignprop_fast.kernels import norm_modulate as norm_kernels
from alignprop_fast.kernels import qk_norm_rope as rope_kernels
from alignprop_fast.ops import activation as activation_op
from alignprop_fast.ops import attention_backends, attention_triton, autotune, backend, switched_off
from alignprop_fast.ops import guided_step as guided_step_op
from alignprop_fast.ops import layer_norm as layer_norm_op
from alignprop_fast.ops import qk_norm_rope as rope_op
from alignprop_fast.ops.attention import attention, attention_reference
from alignprop_fast.ops.lora_linear import lora_linears
from alignprop_fast.ops.lora_linear_plain import Layer, lora_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERRORS = [
    OutOfResources(200_000, 101_376, "shared memory"),
    PTXASError("Internal Triton PTX codegen error"),
    subprocess.CalledProcessError(1, ["gcc", "main.c"], stderr="Python.h: No such file"),
    FileNotFoundError(2, "No such file or directory", "gcc"),
    AssertionError(),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    KeyError("sm_130"),
    ExceptionGroup("of several", [ValueError("a\nb")]),
]


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def gradients(outputs, inputs):
    gs = [torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, gs))


def run_norm(op):
    x, r, gamma, beta = randn(3, 5, 40).requires_grad_(), randn(3, 1, 40).expand(3, 5, 40), randn(40), randn(1, 40)[0]
    if op:
        return gradients(layer_norm_op.layer_norm(x, gamma, beta, 1e-5, r), [x])
    return gradients([layer_norm_op.layer_norm_reference(x + r, gamma, beta, 1e-5), x + r], [x])


def run_activation(op):
    uv = randn(3, 5, 24).requires_grad_()
    return gradients([(activation_op.geglu if op else activation_op.geglu_reference)(uv)], [uv])


def run_guided_step(op):
    x, y, z, weights = randn(2, 4, 3), randn(4, 4, 3), randn(1, 2, 4, 3)[0], (-4.0, 5.0)
    if op:
        forward, adjoint = guided_step_op.guided_step, guided_step_op.guided_step_adjoint
    else:
        forward, adjoint = guided_step_op.guided_step_reference, guided_step_op.guided_step_adjoint_reference
    return [forward(x, y, z, 0.9, weights, 0.3), *adjoint(x, 0.9, weights, torch.float32)]


def lora_layer(width):
    return Layer(randn(width, 40), randn(width), randn(4, 40).requires_grad_(), randn(width, 4).requires_grad_(), 0.5)


def run_lora_linear(op):
    x, layers = randn(2, 9, 40).requires_grad_(), [lora_layer(24), lora_layer(32)]
    ys = lora_linears(x, layers) if op else [lora_linear_reference(x, *layer) for layer in layers]
    return gradients(ys, [x, *(layer.down for layer in layers), *(layer.up for layer in layers)])


def run_attention(op):
    tensors = [randn(2, n, 3, 32).transpose(1, 2).requires_grad_() for n in (40, 20)]
    q, k = tensors
    return gradients([(attention if op else attention_reference)(q, k, k)], tensors)


def run_qk_norm_rope(op):
    q, k, scale, angles = (randn(2, 5, 24) + 0.1 * i for i in range(4))
    q.requires_grad_(), k.requires_grad_()
    pair = (angles[..., :4].cos(), angles[..., :4].sin())
    part = rope_op.Part(q, k, k, (scale[0, 0, :8], scale[0, 1, :8]), pair)
    return gradients((rope_op.qk_norm_rope if op else rope_op.qk_norm_rope_reference)([part], 8, 1e-5)[:2], [q, k])


# Op -> (runs it, or its reference; the module and the name of what starts its kernels, forward and backward).
OPS = {
    "norm_modulate": (run_norm, norm_kernels, "norm_modulate_forward", norm_kernels, "norm_modulate_backward"),
    "activation": (run_activation, activation_kernels, "activation_forward", activation_kernels, "activation_backward"),
    "guided_step": (run_guided_step, guided_step_kernels, "guided_step", guided_step_kernels, "guided_step_adjoint"),
    "lora_linear": (run_lora_linear, lora_kernels.Forward, "__call__", backward_of_lora, "lora_linear_backward"),
    "qk_norm_rope": (
        *(run_qk_norm_rope, rope_kernels, "qk_norm_rope_forward"),
        *(rope_kernels, "qk_norm_rope_backward"),
    ),
    "attention": (run_attention, attention_kernels, "attention_forward", attention_kernels, "attention_backward"),
}


@pytest.fixture(autouse=True)
def all_on():
    switched_off.forget()
    yield
    switched_off.forget()
    autotune.forget()


@pytest.fixture
def by_the_kernels(monkeypatch):
    """Every op chooses its kernels if nothing is switched off, on every device of the tests."""

    def serves(x, op):
        return "reference" if switched_off.reason(f"{op}.triton") else "triton"

    def serves_layers(direction, x, layers):
        return "plain" if switched_off.reason("lora_linear.triton") else "triton"

    monkeypatch.setattr(backend, "backend", serves)
    monkeypatch.setattr("alignprop_fast.ops.lora_linear_trials._fastest", serves_layers)
    chosen = attention_backends.Backend("triton", attention_triton.forward, attention_triton.backward)
    monkeypatch.setattr(attention_backends, "choose", lambda *arguments: chosen)


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        # fp32 sums of at most 40 terms in another order.
        assert a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("backward_alone", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_fails_is_switched_off(by_the_kernels, monkeypatch, caplog, op, backward_alone, error):
    run, forward, forward_name, backward, backward_name = OPS[op]
    calls = []

    def fails(*arguments, **keywords):
        calls.append(None)
        raise error

    monkeypatch.setattr(backward, backward_name, fails)
    if not backward_alone:
        monkeypatch.setattr(forward, forward_name, fails)
    with caplog.at_level(logging.WARNING):
        same(run(True), run(False))
    direction = "backward" if backward_alone else "forward"
    name = f"attention.triton.{direction}" if op == "attention" else f"{op}.triton"
    assert type(error).__name__ in switched_off.reason(name)
    off = switched_off.everything()
    assert len(caplog.records) == len(off) and all("\n" not in r.getMessage() for r in caplog.records)
    started = len(calls)
    same(run(True), run(False))
    assert len(calls) == started and switched_off.everything() == off, "not tried again"


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_serve_where_nothing_fails(by_the_kernels, op):
    same(OPS[op][0](True), OPS[op][0](False))
    assert not switched_off.everything()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
@pytest.mark.parametrize("op", OPS)
def test_a_full_device_is_no_failure_of_the_kernel(by_the_kernels, monkeypatch, op, error):
    run, forward, forward_name, *_ = OPS[op]

    def full(*arguments, **keywords):
        raise error

    monkeypatch.setattr(forward, forward_name, full)
    with pytest.raises(type(error)):
        run(True)
    assert not switched_off.everything()


def test_arguments_at_fault_switch_nothing_off():
    with pytest.raises(RuntimeError):
        attention(randn(1, 2, 3, 8), randn(1, 2, 3, 9), randn(1, 2, 3, 9))
    assert not switched_off.everything()


def test_while_a_graph_is_captured_nothing_is_caught(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ZeroDivisionError):
        backend.attempt("x", lambda n: n / 0, lambda n: n, 1)
    assert not switched_off.everything()


@pytest.mark.parametrize("fails", [None, "raises", "lies"])
def test_triton_is_tried_once_per_device(monkeypatch, fails):
    """The probe on this device, as `backend` starts it for the first tensor on a GPU."""
    device, tried = torch.device(DEVICE), []
    kernel = activation_kernels.activation_forward

    def forward(v, *rest):
        tried.append(v.device.type)
        if fails == "raises":
            raise FileNotFoundError(2, "No such file or directory", "gcc")
        return 0.9 * kernel(v, *rest) if fails == "lies" else kernel(v, *rest)

    monkeypatch.setattr(activation_kernels, "activation_forward", forward)
    monkeypatch.setattr(backend, "_probed", set())
    backend._probe(device)
    assert tried == [device.type] and device in backend._probed
    reason = switched_off.reason("triton")
    assert (reason is None) == (fails is None)
    assert fails != "raises" or reason.startswith("FileNotFoundError")


def test_a_full_device_proves_nothing_about_triton(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(activation_kernels, "activation_forward", full)
    monkeypatch.setattr(backend, "_probed", set())
    with pytest.raises(torch.OutOfMemoryError):
        backend._probe(torch.device(DEVICE))
    assert not switched_off.everything() and not backend._probed


def test_an_empty_tensor_has_nothing_to_start_a_kernel_for():
    for shape in ((0, 8), (2, 0, 8)):
        x = randn(*shape).requires_grad_()
        assert backend.backend(x, "activation") == "reference"
        same(gradients([activation_op.geglu(x)], [x]), gradients([activation_op.geglu_reference(x)], [x]))
        y = layer_norm_op.layer_norm(x, None, randn(8))
        assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
