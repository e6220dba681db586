"""Classes of diffusers and transformers by name, some of which only newer releases have."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def diffusers_class(name: str) -> Any:
    """A class of diffusers. Raises ValueError if the installed release is too old for it."""
    return library_class("diffusers", name)


def library_class(library: str, name: str) -> Any:
    """A class of diffusers or transformers. Raises ValueError if the installed release is too old for it."""
    module = import_module(library)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ValueError(
            f"{library} {module.__version__} has no {name}: update it with pip install -U diffusers transformers"
        ) from error
