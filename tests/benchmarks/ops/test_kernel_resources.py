"""The resource report over the small kernels, compiled for sm_89 without a GPU; and that it notices what it must."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignprop_fast.ops.extension import find_nvcc
from benchmarks.ops import kernel_resources

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
# In a process of its own: other tests run the kernels in the interpreter, which replaces the compiler.
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments, environment=COMPILING):
    command = [sys.executable, "-m", "benchmarks.ops.kernel_resources", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow("twenty seconds of compiling")
def test_small_kernels_keep_the_limits_on_sm_89(tmp_path):
    result = run("--arch", "89", "--only", "activation", "guided_step", "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    names = {row["kernel"] for row in rows}
    assert {"activation_backward_kernel", "guided_step_adjoint_kernel"} <= names
    assert all(0 < row["registers"] <= 255 and row["spills"] == 0 and row["arch"] == 89 for row in rows)


@pytest.mark.slow("compiles csrc for a GPU")
@pytest.mark.skipif(find_nvcc() is None, reason="no CUDA compiler")
def test_csrc_keeps_the_limits_on_sm_89(tmp_path):
    result = run("--arch", "89", "--only", "csrc", "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {"apply_kernel", "statistics_kernel", "reduce_kernel"} <= {row["kernel"] for row in rows}
    assert len({(row["kernel"], row["config"]) for row in rows}) == len(rows)
    assert all(0 < row["registers"] <= 255 and row["spills"] == 0 for row in rows)


def test_limits_go_by_architecture():
    spilling = {"spills": 16, "shared_bytes": 0}
    assert "spills 16" in kernel_resources.broken_limits({**spilling, "arch": 89})
    assert not kernel_resources.broken_limits({**spilling, "arch": 100})
    large = {"spills": 0, "shared_bytes": 99 * 1024 + 1}
    assert "shared" in kernel_resources.broken_limits({**large, "arch": 120})
    assert not kernel_resources.broken_limits({**large, "arch": 90})
    assert not kernel_resources.broken_limits({"spills": 0, "shared_bytes": 99 * 1024, "arch": 86})


def test_a_kernel_in_no_signature_and_one_that_spills_are_faults(tmp_path):
    module = tmp_path / "extra.py"
    module.write_text(
        "import triton\nimport triton.language as tl\n\n"
        "@triton.jit\ndef forgotten_kernel(x_ptr):\n    tl.store(x_ptr, 0.0)\n\n"
        "@triton.jit\ndef unnamed(x_ptr):\n    tl.store(x_ptr, 0.0)\n\n"
        "@triton.jit\ndef helper(x):\n    return x\n\n"
        "@triton.jit\ndef wide_kernel(x_ptr, BLOCK: tl.constexpr):\n"
        "    i = tl.arange(0, BLOCK)\n    x = tl.load(x_ptr + i)\n"
        "    tl.store(x_ptr + i, x / tl.sum(x, 0))\n\n"
        "def go(x):\n    launch(unnamed, (1,), x)\n\n"
        "def signatures():\n    return [dict(kernel=wide_kernel, config='wide', signature={'x_ptr': '*fp32'},"
        " constexprs={'BLOCK': 16384}, num_warps=1, num_stages=1, arch=None)]\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import extra; import benchmarks.ops.kernel_resources as k;"
        "k.modules = lambda only: [extra]; print('\\n'.join(k.report([89], [])[1]))"
    )
    faults = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=COMPILING, capture_output=True, text=True
    ).stdout
    assert "forgotten_kernel of extra is in no signature" in faults and "unnamed of extra is in no signature" in faults
    assert "wide_kernel wide sm_89: spills" in faults and "helper" not in faults


def test_usage_is_read_from_cuobjdump():
    report = "Common:\n GLOBAL:0\n Function f:\n  REG:72 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:448 TEXTURE:0"
    assert kernel_resources.parse_usage(report) == {"REG": 72, "STACK": 8, "SHARED": 16, "LOCAL": 4}


def test_bad_input_is_refused():
    result = run("--arch", "89", environment={**COMPILING, "TRITON_INTERPRET": "1"})
    assert result.returncode == 2 and "unset it" in result.stderr
    result = run("--arch", "89", "--only", "nonsense")
    assert result.returncode != 0 and "no such module" in result.stderr
