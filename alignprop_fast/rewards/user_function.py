"""Finds the user's functions, named `module:function`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any


def is_function_name(text: str) -> bool:
    """Whether `text` has the form `module:function`, for example `package.module:function`."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", text) is not None


def user_function(name: str, what: str, hint: str = "") -> Callable[..., Any]:
    """The function `name`, "module:function", of an installed module or one in the working directory.

    what: its purpose, for example "reward 'm:f'". hint: what else the user may have meant. Both are for the message.
    Raises ValueError, one line, if the module cannot be imported or lacks the function.
    """
    module_name, _, function_name = name.partition(":")
    # As with `python -m`, the working directory is searched, but only during the import. Other code, such as
    # transformers, looks for optional packages by name and must not find the user's folders instead.
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{what}: no module {error.name!r} in {folder} nor installed. {hint}".rstrip()) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what}: importing {module_name!r} failed with {reason}") from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "is not a function" if hasattr(module, function_name) else "does not exist"
        raise ValueError(f"{what}: {function_name!r} {found} in {module.__file__ or module_name}")
    return function
