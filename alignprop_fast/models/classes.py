"""Classes of diffusers and transformers by name, as not every installation has all; the tokenizer of a processor."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def diffusers_class(name: str) -> Any:
    """A class of diffusers. Raises ValueError if the installed release is too old for it."""
    return library_class("diffusers", name)


def library_class(library: str, name: str) -> Any:
    """A class of diffusers or transformers.

    Raises:
        ValueError: the installed release is too old for it, or a package that it needs is not installed.
    """
    module = import_module(library)
    try:
        found = getattr(module, name)
    except AttributeError as error:
        raise ValueError(
            f"{library} {module.__version__} has no {name}: update it with pip install -U diffusers transformers"
        ) from error
    # Both libraries have a stand-in for a class whose packages are missing; it names them.
    if "torchvision" in getattr(found, "_backends", ()) and find_spec("torchvision") is None:
        import torch

        release = torch.__version__.partition("+")[0]
        raise ValueError(f"{name} needs torchvision: pip install torchvision torch=={release}")
    return found


def tokenizer_of(part: Any) -> Any:
    """The tokenizer of a pipeline's part, which may be a processor of texts and pictures."""
    from transformers import ProcessorMixin

    return part.tokenizer if isinstance(part, ProcessorMixin) else part
