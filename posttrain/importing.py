"""Functions of the user's own, which a recipe names as `package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from posttrain.errors import BadInput


def import_function(path: str, where: str) -> Callable[..., Any]:
    """The function at `package.module:function`.

    Args:
        where: the recipe's key, for error messages.

    Raises:
        BadInput: no such path, a module that cannot be imported, or something that is no function.
    """
    module_name, _, function_name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise BadInput(f"{where}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise BadInput(f"{where}: {path} is not a function")
    return function
