"""Package layout; everything else is in pyproject.toml."""

from setuptools import setup

PACKAGES = ["demo", "models", "ops", "planner", "rewards", "runtime", "sampling"]

setup(
    # Listed, not found: `alignprop_fast/kernels` is a link to the root folder `kernels`, which must reach the package
    # under that name alone: a top-level package `kernels` would shadow the one that diffusers and transformers probe.
    packages=["alignprop_fast", "alignprop_fast.kernels", *(f"alignprop_fast.{name}" for name in PACKAGES)],
    package_dir={"alignprop_fast.kernels": "kernels"},
)
