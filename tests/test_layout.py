"""The layout as a contract: who imports whom, and a folder `kernels` that is nobody else's package."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import alignprop_fast
import alignprop_fast.kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "alignprop_fast"

# Rows of the import table: what a part may import of this package, and of others when it is imported itself.
TRAINER = {
    *("checkpoint", "config", "control", "data", "flat_parameters", "launcher", "metrics", "model_card", "optim"),
    *("optimizer_in_backward", "out_of_memory", "placement", "processes", "report", "stochastic_rounding"),
    *("prepare", "training_state", "weight_update", "field_types"),
}
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "kernels": (set(), {"torch", "triton"}),
    "ops": ({"kernels"}, {"torch", "filelock"}),
    "planner": (set(), {"numpy"}),
    "files": (set(), set()),
    "text_limits": (set(), set()),
    "sampling": ({"ops"}, {"torch"}),
    "runtime": ({"ops", "planner"}, {"torch"}),
    "doctor": ({"ops", "runtime"}, {"torch"}),
    "models": (
        {"files", "ops", "demo", "text_limits"},
        {"torch", "numpy", "diffusers", "transformers", "peft", "safetensors"},
    ),
    "rewards": ({"ops", "demo", "text_limits"}, {"torch"}),
    "demo": (set(), {"torch", "numpy", "PIL", "diffusers", "transformers", "tokenizers", "safetensors"}),
    "generate": ({"models", "sampling", "runtime", "planner", "cost_table", "fast_predict", "text_limits"}, {"torch"}),
    "fast_predict": ({"models", "runtime"}, {"torch"}),
    "cost_table": ({"models", "sampling", "runtime", "planner"}, {"torch"}),
    "evaluate": ({"data", "generate", "rewards"}, {"torch"}),
    "tracking": (set(), {"numpy", "PIL"}),
    "watch": ({"data", "evaluate", "generate", "rewards"}, {"torch"}),
    "report_plan": ({"planner", "report"}, set()),
    "report_evaluation": ({"evaluate", "files", "report"}, {"PIL"}),
    "trainer": (
        {"doctor", "files", "generate", "ops", "rewards", "planner", "trainer", *TRAINER},
        {"torch", "numpy", "accelerate", "huggingface_hub", "rich", "matplotlib", "PIL", "yaml"},
    ),
}
ONLY_IN_MODELS = {"diffusers", "peft", "transformers"}


def part_of(path: Path) -> str:
    """Row of the table that a source file belongs to."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "trainer" if name in TRAINER else name


def imports(path: Path, lazily: bool) -> set[str]:
    """Modules that a file imports: at its top level, or (lazily) inside functions as well."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazily else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["alignprop_fast", *path.relative_to(PACKAGE).parts[: -node.level]]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "alignprop_fast" else {module}
    return found


def sources() -> list[Path]:
    files = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.parts] + list((ROOT / "kernels").glob("*.py"))
    return [p for p in files if p.parent.name == "kernels" or part_of(p) in ALLOWED]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_keep_to_the_table(path):
    part = "kernels" if path.parent.name == "kernels" else part_of(path)
    ours, others = ALLOWED[part]
    for module in imports(path, lazily=True) if part != "kernels" else imports(path, lazily=False):
        if module.startswith("alignprop_fast."):
            assert module.split(".")[1] in {part, *ours}, f"{part} must not import {module}"
    for module in imports(path, lazily=False):
        top = module.split(".")[0]
        if top != "alignprop_fast" and top not in sys.stdlib_module_names:
            assert top in others, f"{part} must not import {top} at its top level"
    if part in {"ops", "planner", "runtime", "sampling", "generate"}:
        assert not {m.split(".")[0] for m in imports(path, lazily=True)} & ONLY_IN_MODELS


def test_nobody_imports_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        if path.name not in {"__main__.py"} and not path.name.startswith("cli"):
            assert not any(module.startswith("alignprop_fast.cli") for module in imports(path, lazily=True)), path


def test_every_package_is_installed():
    listed = (ROOT / "setup.py").read_text()
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert all(f'"{name}"' in listed for name in packages)


def test_kernels_is_ours_alone():
    assert (PACKAGE / "kernels").is_symlink() and os.readlink(PACKAGE / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "conftest.py").exists()
    assert "pythonpath" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert importlib.util.find_spec("alignprop_fast.kernels.guided_step") is not None
    # Here, under pytest from the repository root, the folder must not pass for the package of that name.
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(spec.origin or ROOT / "x").parents


def test_a_script_in_the_root_does_not_take_the_folder_for_the_kernels_package():
    """Python puts the root first on its path there; the probes of diffusers and transformers must find nothing."""
    if importlib.util.find_spec("kernels") is not None:
        pytest.skip("the real package `kernels` is installed here")
    code = (
        "from diffusers.utils import import_utils as d; from transformers.utils import import_utils as t;"
        "print(d.is_kernels_available(), t.is_kernels_available())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_import_is_cheap_and_names_are_there():
    code = "import sys, alignprop_fast; print([m for m in ('torch', 'diffusers', 'triton') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    for name in alignprop_fast.__all__:
        assert getattr(alignprop_fast, name).__name__ == name
    with pytest.raises(AttributeError):
        alignprop_fast.Unknown  # noqa: B018
