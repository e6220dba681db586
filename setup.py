"""Package layout, and the compiled kernels where torch is at hand; everything else is in pyproject.toml."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGES = [
    *("cli", "demo", "doctor", "evaluation", "generate", "making", "making.random_weights"),
    *("models", "models.lean", "models.load", "models.lora", "ops", "planner", "prompts", "report", "rewards"),
    *("runtime", "sampling", "training"),
]
# Root folders that reach the package under its name alone, each through a link in it: a top-level package `kernels`
# would shadow the one that diffusers and transformers probe.
LINKED = ["csrc", "kernels"]
HAS_TORCH = importlib.util.find_spec("torch") is not None


class BuildWithKernels(build_py):
    """Adds the compiled library if torch can be imported, which build isolation forbids: then first use builds it."""

    def run(self) -> None:
        super().run()
        if HAS_TORCH and not self.editable_mode:
            build_kernels(Path(self.build_lib) / "alignprop_fast" / "ops")


def build_kernels(destination: Path) -> None:
    """Compile csrc/ for every GPU that the compiler knows; without a compiler say so and go on."""
    spec = importlib.util.spec_from_file_location("extension", ROOT / "alignprop_fast" / "ops" / "extension.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    extension.SOURCES = ROOT / "csrc"  # a source distribution has no links
    arches = extension.known_arches()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / extension.library_name(arches)
        try:
            extension.build(library, arches)
        except extension.BuildError as error:
            print(f"kernels not built: {error}")
            return
        shutil.copy(library, destination)


class KernelDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        """A wheel with a compiled library is for one platform."""
        return HAS_TORCH


setup(
    # Listed, not found: see LINKED.
    packages=["alignprop_fast", *(f"alignprop_fast.{name}" for name in [*PACKAGES, *LINKED])],
    package_dir={f"alignprop_fast.{name}": name for name in LINKED},
    cmdclass={"build_py": BuildWithKernels},
    distclass=KernelDistribution,
)
