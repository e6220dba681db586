"""The command `doctor` on the CPU: its table, its file, its exit code."""

import json

import pytest
import torch


@pytest.fixture
def doctor(command, tmp_path, monkeypatch):
    """Runs `doctor` in its own folder; returns exit code, stdout and stderr."""
    monkeypatch.setattr("alignprop_fast.doctor.ceilings.MOST_SECONDS", 0.01)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: command("doctor", *arguments)


def test_table_and_file(doctor, tmp_path):
    code, out, _ = doctor("--device", "cpu", "--json", "new/doctor.json")
    assert code == 0 and "banded_residual" in out and "cpu > cpu" in out and "nothing that stops training" in out
    content = json.loads((tmp_path / "new" / "doctor.json").read_text())
    assert content["device"] == "cpu" and content["exit_code"] == 0
    assert {check["dtype"] for check in content["checks"]} == {"bfloat16", "float32"}


def test_a_gpu_that_is_not_there_is_a_row_and_exit_code_1(doctor):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = doctor("--device", "cuda")
    assert code == 1 and "cannot be used" in out and torch.__version__ in out and "Traceback" not in out + err


def test_bad_input_is_exit_code_2(doctor, tmp_path):
    code, _, err = doctor("--device", "gpu")
    assert code == 2 and "unknown device 'gpu'" in err
    (tmp_path / "file").write_text("")
    code, _, err = doctor("--device", "cpu", "--json", "file/doctor.json")
    assert code == 2 and "is a file" in err
