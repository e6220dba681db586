"""Classes of diffusers by name, some of which only newer releases have."""

from __future__ import annotations

from typing import Any


def diffusers_class(name: str) -> Any:
    """A class of diffusers. Raises ValueError if the installed release is too old for it."""
    import diffusers

    try:
        return getattr(diffusers, name)
    except AttributeError as error:
        raise ValueError(
            f"diffusers {diffusers.__version__} has no {name}: update it with pip install -U diffusers transformers"
        ) from error
