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

# The rooms of the house, from the bottom to the top: what a folder (or a file beside them) may import of this package,
# and of others at the top level of a file. A folder may import itself.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "version": (set(), set()),
    "files": (set(), set()),
    "kernels": (set(), {"torch", "triton"}),
    "planner": (set(), {"numpy"}),
    "prompts": (set(), set()),
    "ops": ({"files", "kernels", "version"}, {"torch", "filelock"}),
    "sampling": ({"ops"}, {"torch"}),
    "runtime": ({"ops", "planner"}, {"torch"}),
    "doctor": ({"files", "ops", "planner", "runtime", "version"}, {"torch"}),
    "demo": (set(), {"torch", "PIL"}),
    "making": ({"demo", "files"}, {"torch", "numpy", "PIL", "safetensors"}),
    "models": ({"demo", "files", "ops", "prompts"}, {"torch", "numpy", "diffusers", "peft"}),
    "rewards": ({"demo", "ops", "prompts"}, {"torch"}),
    "generate": ({"files", "models", "planner", "prompts", "rewards", "runtime", "sampling", "version"}, {"torch"}),
    "evaluation": ({"generate", "prompts", "rewards"}, {"torch"}),
    "report": ({"evaluation", "files", "planner"}, {"numpy", "PIL"}),
    "training": (
        {"doctor", "evaluation", "generate", "models", "ops", "planner", "report", "rewards", "sampling"},
        {"torch", "numpy", "accelerate", "diffusers", "huggingface_hub"},
    ),
    "cli": (
        {
            *("demo", "doctor", "evaluation", "files", "generate", "models", "ops", "planner", "prompts", "report"),
            *("rewards", "sampling", "training", "version"),
        },
        {"typer", "rich", "yaml", "PIL"},
    ),
    "__init__": ({"generate", "models", "training", "version"}, set()),
    "__main__": ({"cli"}, set()),
}
ONLY_IN_MODELS = {"diffusers", "peft", "transformers"}  # of the parts that the gradient passes


def room_of(module: str) -> str:
    """The folder of a module of this package, or the file beside the folders."""
    return module.split(".")[1] if "." in module else "__init__"


def modules(folder: Path) -> dict[str, Path]:
    """Every module in a folder of the root by its dotted name."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in folder.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = modules(PACKAGE) | {f"alignprop_fast.{name}": path for name, path in modules(ROOT / "kernels").items()}
ALL_MODULES = MODULES | modules(ROOT / "benchmarks")


def imports(path: Path, lazily: bool) -> set[str]:
    """Modules that a file imports: at its top level, or (lazily) anywhere, functions and type checking included."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if lazily else iter(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: say the whole name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in ALL_MODULES else str(node.module) for name in names}
    return found


def ours(path: Path) -> set[str]:
    """Modules of this package, and of its benchmarks, that a file imports in any way."""
    return {name for name in imports(path, lazily=True) if name.split(".")[0] in ("alignprop_fast", "benchmarks")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_file_has_a_room_and_imports_keep_to_the_table(module):
    room, path = room_of(module), MODULES[module]
    assert room in ALLOWED, f"{path} is in no room of the table: put it into one"
    rooms, others = ALLOWED[room]
    for name in ours(path):
        assert room_of(name) in {room, *rooms}, f"{room} must not import {name}"
    for name in imports(path, lazily=False):
        top = name.split(".")[0]
        if top != "alignprop_fast" and top not in sys.stdlib_module_names:
            assert top in others, f"{room} must not import {top} at its top level"
    if room in {"ops", "planner", "runtime", "sampling", "generate"}:
        assert not {name.split(".")[0] for name in imports(path, lazily=True)} & ONLY_IN_MODELS


def test_no_row_allows_more_than_its_room_uses():
    for room, (rooms, others) in ALLOWED.items():
        paths = [path for module, path in MODULES.items() if room_of(module) == room]
        used = {room_of(name) for path in paths for name in ours(path)} - {room}
        tops = {name.split(".")[0] for path in paths for name in imports(path, lazily=False)}
        assert rooms == used, f"{room}: {rooms ^ used}"
        assert others == tops - {"alignprop_fast", *sys.stdlib_module_names}, f"{room}: {others ^ tops}"


def test_every_row_of_the_table_has_a_room():
    assert set(ALLOWED) == {room_of(module) for module in MODULES if module != "alignprop_fast"} | {"__init__"}


def test_no_module_imports_itself_by_way_of_others():
    """Type-checking imports and those inside functions count: a circle of readers is one for people, too."""
    left = {module: ours(path) - {module} for module, path in ALL_MODULES.items()}
    while ends := {m for m in left if not left[m] & left.keys() or not any(m in needs for needs in left.values())}:
        left = {module: needs for module, needs in left.items() if module not in ends}
    assert not left, f"in a circle, or between two: {sorted(left)}"


def test_every_package_is_installed():
    listed = (ROOT / "setup.py").read_text()
    packages = {".".join(p.relative_to(PACKAGE).parent.parts) for p in PACKAGE.rglob("*/__init__.py")}
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
    for name in set(alignprop_fast.__all__) - {"__version__"}:
        assert getattr(alignprop_fast, name).__name__ == name
    with pytest.raises(AttributeError):
        alignprop_fast.Unknown  # noqa: B018
