"""What doctor finds on a GPU: all right as it is; and a kernel that is wrong, one whose backward pass gives other bits
each time, one that raises, and a device that answers no more: each seen, named and switched off.
"""

import dataclasses
import itertools
import json
import os

import pytest
import torch

from alignprop_fast.doctor import attention, examine, first_time, op_cases
from alignprop_fast.ops import attention_backends, autotune, switched_off

CUDA = torch.device("cuda", 0)
BF16 = [torch.bfloat16]
SIZES = (attention.Sizes(1, 1, 32, 77, 32), attention.Sizes(1, 1, 32, 77, 32, low=True))


@pytest.fixture(autouse=True)
def fresh(emulated, monkeypatch):
    """Nothing is switched off. Sizes are small, because the interpreter takes minutes for thousands of keys."""
    monkeypatch.setattr(autotune, "REPETITIONS", 1)
    monkeypatch.setattr("alignprop_fast.doctor.ceilings.MOST_SECONDS", 0.01)
    monkeypatch.setattr(
        attention, "SMALL", (attention.Sizes(1, 1, 32, 77, 32), attention.Sizes(1, 1, 32, 77, 32, True))
    )
    switched_off.forget()
    yield
    switched_off.forget()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def replaced(monkeypatch):
    """Put another forward or backward pass into one of attention's implementations, and examine attention alone."""
    monkeypatch.setattr(op_cases, "kernel_cases", lambda draw, large, quick: ())

    def replace(name, **passes):
        backends = attention_backends._cuda_backends()
        monkeypatch.setitem(backends, name, dataclasses.replace(backends[name], **passes))

    return replace


def rows(report, implementation):
    return [check for check in report.checks if check.implementation == implementation]


@pytest.mark.slow("runs every kernel in Triton's interpreter, in two dtypes")
def test_all_is_right_and_everything_is_in_the_report():
    # Without fp16, which behaves like bf16 here and is slow in the interpreter.
    report = examine(CUDA, dtypes=[torch.bfloat16, torch.float32])
    assert report.exit_code == 0 and not report.off and not report.wrong()
    assert not [check for check in report.checks if check.fault or check.note]
    pairs = {check.implementation for check in report.checks if check.op == "attention"}
    names = attention_backends._cuda_backends()
    assert {f"{one} > {two}" for one, two in itertools.product(names, names)} < pairs
    triton = {check.op for check in rows(report, "triton")}
    assert triton > {"layer_norm", "norm_modulate", "geglu", "swiglu", "gelu_tanh", "guided_step", "lora_linear"}
    assert {check.dtype for check in report.checks} == {"bfloat16", "float32"}
    assert {fact.section for fact in report.facts} == {"software", "device", "ceilings", "speeds"}
    assert {"GPU", "memory", "free memory", "copy", "host link"} < {fact.name for fact in report.facts}
    assert json.loads(report.to_json())["exit_code"] == 0


def test_a_wrong_kernel_is_switched_off(monkeypatch):
    from alignprop_fast.kernels import activation

    monkeypatch.setattr(attention, "SMALL", ())
    right = activation.activation_backward
    monkeypatch.setattr(activation, "activation_backward", lambda g, *rest: right(g * 1.05, *rest))
    report = examine(CUDA, quick=True)
    assert report.exit_code == 0 and list(report.off) == ["activation.triton"]
    assert "gradient 0" in report.off["activation.triton"] and report.remedies["activation.triton"]
    assert all(check.off == "activation.triton" for check in report.checks if check.fault)
    # From here on the plain path serves.
    monkeypatch.setattr(op_cases, "kernel_cases", lambda draw, large, quick: op_cases._activation(draw, large))
    again = examine(CUDA, quick=True)
    assert {check.implementation for check in again.checks if check.op == "geglu"} == {"reference"}
    assert not [check for check in again.checks if check.fault]


def test_nan_where_all_logits_are_low_is_seen(replaced):
    def forgets_the_maximum(q, k, v, scale):
        weights = (scale * q.float() @ k.float().mT).exp().to(torch.float16)
        return (weights / weights.sum(-1, keepdim=True) @ v.half()).to(q.dtype), (scale * q @ k.mT).float().logsumexp(
            -1
        )

    replaced("cudnn", forward=forgets_the_maximum)
    report = examine(CUDA, quick=True)
    assert report.exit_code == 0 and list(report.off) == ["attention.cudnn.forward"]
    assert "logits near -100" in report.off["attention.cudnn.forward"]
    assert "NaN" in report.off["attention.cudnn.forward"]


def test_other_bits_each_time(replaced):
    flash = attention_backends._cuda_backends()["flash"]
    count = itertools.count()

    def drifting(*arguments):
        dq, dk, dv = flash.backward(*arguments)
        return dq * (1 + 2**-7 * (next(count) % 2)), dk, dv

    replaced("flash", backward=drifting)
    report = examine(CUDA, quick=True)
    assert not report.off and {check.deterministic for check in rows(report, "cudnn > flash")} == {False}
    torch.use_deterministic_algorithms(True, warn_only=True)
    report = examine(CUDA, quick=True)
    assert report.exit_code == 0 and list(report.off) == ["attention.flash.backward"]
    assert "two runs differ" in report.off["attention.flash.backward"]


def test_what_always_raises_is_switched_off_and_what_raises_for_a_dtype_is_not(replaced):
    def missing(q, k, v, scale):
        raise NotImplementedError("not compiled for this GPU")

    efficient = attention_backends._cuda_backends()["efficient"]

    def halves_alone(q, k, v, scale):
        if q.dtype is torch.float32:
            raise RuntimeError("fp16 and bf16 only")
        return efficient.forward(q, k, v, scale)

    replaced("flash", forward=missing)
    replaced("efficient", forward=halves_alone)
    report = examine(CUDA, quick=True, dtypes=[torch.bfloat16, torch.float32])
    assert report.exit_code == 0 and list(report.off) == ["attention.flash.forward"]
    assert "not compiled for this GPU" in report.off["attention.flash.forward"]
    assert {check.note for check in rows(report, "efficient")} == {None, "cannot run: RuntimeError: fp16 and bf16 only"}


def test_plain_pytorch_wrong_is_exit_code_1(monkeypatch):
    product = torch.nn.functional.linear
    monkeypatch.setattr(
        "alignprop_fast.doctor.plain_cases.F.linear", lambda x, w: product(x, w) * (1.1 if x.is_cuda else 1)
    )
    monkeypatch.setattr(op_cases, "kernel_cases", lambda draw, large, quick: ())
    monkeypatch.setattr(attention, "SMALL", ())
    report = examine(CUDA, dtypes=BF16)
    assert report.exit_code == 1 and any("matrix product" in line for line in report.wrong())


def test_a_lost_device_ends_the_examination_with_the_name_of_what_lost_it(replaced, monkeypatch):
    lost = []

    def illegal(q, k, v, scale):
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    replaced("efficient", forward=illegal)
    monkeypatch.setattr("alignprop_fast.doctor.checking.answers", lambda device: not lost)
    report = examine(CUDA, quick=True)
    assert (
        report.lost and report.exit_code == 1 and "illegal memory access" in report.off["attention.efficient.forward"]
    )


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Gives other processes the emulated GPU too; they run what tests append to the returned file.

    They examine the activations alone.
    """
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import emulate; emulate.start()\n"
        "from alignprop_fast.doctor import attention, op_cases\n"
        "op_cases.kernel_cases = lambda draw, large, quick: op_cases._activation(draw, large)\n"
        "attention.SMALL = ()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    monkeypatch.setattr(first_time, "cache_folder", lambda: tmp_path / "cache")
    return site


def test_before_the_first_step_once(elsewhere, caplog):
    with elsewhere.open("a") as file:
        file.write("import atexit, os\natexit.register(os._exit, 134)\n")  # a crash after the report costs nothing
    first_time.examine_once(CUDA, torch.bfloat16)
    (said,) = caplog.messages
    assert "all right" in said and not switched_off.everything()
    elsewhere.write_text("raise SystemExit('must not start')")
    first_time.examine_once(CUDA, torch.bfloat16)
    assert len(caplog.messages) == 1


def test_before_the_first_step_where_nothing_can_be_remembered(elsewhere, caplog, monkeypatch, tmp_path):
    """The system refuses to look into the cache folder. Root may look into any, but no name may be so long."""
    refused = tmp_path / ("long" * 100)
    monkeypatch.setattr(first_time, "cache_folder", lambda: refused)
    with pytest.raises(OSError, match="too long"):
        refused.stat()
    with elsewhere.open("a") as file:
        file.write("op_cases.kernel_cases = lambda draw, large, quick: ()\n")  # what is found is another test
    first_time.examine_once(CUDA, torch.bfloat16)
    (said,) = caplog.messages
    assert "all right" in said


def test_before_the_first_step_a_failure_is_off_and_not_remembered(elsewhere, caplog):
    with elsewhere.open("a") as file:
        file.write(
            "from alignprop_fast.kernels import activation\nactivation.activation_forward = lambda v, *rest: v * 0\n"
        )
    state = torch.get_rng_state()
    first_time.examine_once(CUDA, torch.bfloat16)
    # Triton's probe uses the same kernel and sees it first.
    assert set(switched_off.everything()) <= {"triton", "activation.triton"} and switched_off.everything()
    assert "not right" in caplog.messages[-1] and torch.equal(state, torch.get_rng_state())
    assert not (first_time.cache_folder()).exists()


def test_before_the_first_step_a_process_that_dies_costs_one_line(elsewhere, caplog):
    elsewhere.write_text("import os; os.write(2, b'where it died'); os._exit(139)")
    first_time.examine_once(CUDA, torch.bfloat16)
    (said,) = caplog.messages
    assert "could not be examined" in said and "139: where it died" in said
