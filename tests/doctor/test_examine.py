"""An examination of the CPU: everything is in it, a fault in one section is a row, and plain PyTorch is above all."""

import json

import pytest
import torch

from alignprop_fast.doctor import attention, examine, facts
from alignprop_fast.doctor.remedies import remedy
from alignprop_fast.ops import frozen_conv2d, switched_off

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_off(monkeypatch):
    switched_off.forget()
    monkeypatch.setattr("alignprop_fast.doctor.ceilings.MOST_SECONDS", 0.01)
    yield
    switched_off.forget()


def test_the_cpu_is_right():
    told = []
    report = examine(CPU, dtypes=[torch.float32], tell=told.append)
    assert report.exit_code == 0 and not report.off and not [c for c in report.checks if c.fault or c.note]
    assert {
        "layer_norm",
        "qk_norm_rope",
        "geglu",
        "guided_step",
        "guided_step adjoint",
        "lora_linear",
        "group_norm_silu",
    } < {check.op for check in report.checks}
    assert {"PyTorch", "attention", "lora_linear", "group_norm_silu"} < {check.op for check in report.checks}
    assert {"frozen_conv2d", "norm_conv", "upsample_conv", "banded_residual"} < {check.op for check in report.checks}
    keys = {word for check in report.checks if check.op == "attention" for word in check.case.split() if word[0] == "N"}
    assert keys == {"N77", "N576", "N4096", "N4429"}
    assert all(check.deterministic for check in report.checks)
    assert {"torch", "C compiler", "Python.h", "ninja", "CPU", "copy"} < {fact.name for fact in report.facts}
    content = json.loads(report.to_json())
    assert content["exit_code"] == 0 and len(content["checks"]) == len(report.checks) and told


def test_the_same_random_numbers_after_it():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    examine(CPU, quick=True)
    assert torch.equal(torch.randn(3), expected)


def test_a_wrong_op_is_off_and_its_reference_serves(monkeypatch):
    monkeypatch.setattr(frozen_conv2d._FrozenConv2d, "apply", lambda x, w, b, *rest: frozen_conv2d.F.conv2d(x, w, b))
    report = examine(CPU, dtypes=[torch.float32])
    assert report.exit_code == 0 and list(report.off) == ["frozen_conv2d"] and report.remedies["frozen_conv2d"]
    assert examine(CPU, dtypes=[torch.float32]).checks[-1].fault is None


def test_wrong_where_nothing_takes_its_place_is_exit_code_1(monkeypatch):
    def zeros(g, x, *rest):
        return torch.zeros_like(x), g.new_empty(0)

    monkeypatch.setattr("alignprop_fast.ops.activation._plain_backward", zeros)
    report = examine(CPU, quick=True)
    wrong = {line.split(" (reference")[0] for line in report.wrong()}
    assert report.exit_code == 1 and wrong == {"geglu", "swiglu", "gelu_tanh"}


def test_a_fault_in_a_section_is_a_row(monkeypatch):
    def broken(device):
        raise RuntimeError("no such counter\nand more")

    monkeypatch.setattr(facts, "memory_of", broken)
    report = examine(CPU, quick=True)
    (row,) = report.facts
    assert (row.section, row.name, row.value) == ("device", "not examined", "RuntimeError: no such counter")
    assert report.exit_code == 0 and report.checks


def test_a_size_too_large_for_the_device_costs_its_row_alone(monkeypatch):
    def formula(q, *rest):
        if q.shape[2] == 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(q, *rest)

    right = attention.formula
    monkeypatch.setattr(attention, "formula", formula)
    rows = [check for check in examine(CPU, quick=True).checks if check.op == "attention"]
    assert "memory is full" in rows[0].note and len(rows) > 10 and not [check for check in rows if check.fault]


def test_a_device_that_cannot_be_used_is_exit_code_1():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    report = examine(torch.device("cuda"))
    assert report.lost and report.exit_code == 1 and not report.checks
    assert any(fact.name == "torch" for fact in report.facts), "what is there is said all the same"


@pytest.mark.parametrize(
    ("reason", "what"),
    [
        ("RuntimeError: Failed to find C compiler. Please specify via CC environment variable.", "gcc"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("no nvcc (pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]', or the CUDA toolkit)", "cuda-toolkit"),
        ("no ninja (pip install ninja)", "pip install ninja"),
        ("triton is not installed", "pip install triton"),
        ("not built (python -m alignprop_fast.ops.extension builds it)", "alignprop_fast.ops.extension"),
        ("error 0.3 in gradient 1, accepted is 0.02", "report it"),
    ],
)
def test_remedies(reason, what):
    assert what in remedy(reason)
