"""Classes of diffusers and transformers by name, as only newer releases have some; the tokenizer of a processor."""

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


def tokenizer_of(part: Any) -> Any:
    """The tokenizer of a pipeline's part, which may be a processor of texts and pictures."""
    from transformers import ProcessorMixin

    return part.tokenizer if isinstance(part, ProcessorMixin) else part
