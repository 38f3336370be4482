"""Objects that a recipe names as `package.module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from posttrain.errors import BadInput


def import_object(path: str, where: str) -> Any:
    """What is called `package.module:name`.

    Args:
        where: the recipe's key, for messages.

    Raises:
        BadInput: there is no such thing, or its module fails.
    """
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise BadInput(f"{where}: {path} cannot be imported: {type(error).__name__}: {error}") from error


def import_function(path: str, where: str) -> Any:
    """As `import_object`, of a function.

    Raises:
        BadInput: also for something that cannot be called.
    """
    function = import_object(path, where)
    if not callable(function):
        raise BadInput(f"{where}: {path} is not a function")
    return function
