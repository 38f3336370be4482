"""Serves the program to its examiner: loads it, looks names up, calls functions. Nothing here is trusted by anyone."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .codec import NotPlain, dump, pack, unpack

REQUESTS, REPLIES = 3, 4


def main(path: str) -> None:
    """Load the program's text as module `solution` and answer requests until there are none."""
    sys.argv = [path]
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    requests, replies = os.fdopen(REQUESTS, "rb"), os.fdopen(REPLIES, "wb", buffering=0)
    with open(path, encoding="utf-8", errors="surrogatepass") as file:
        text = file.read()
    served = _Served(module)
    replies.write(served.attempt(lambda: exec(compile(text, path, "exec"), module.__dict__)))
    for line in requests:
        request = json.loads(line)
        replies.write(served.attempt(partial(served.answer, request)))


class _Served:
    """The program's namespace, and objects that the examiner refers to by number."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.objects: list[Any] = []

    def attempt(self, action: Callable[[], Any]) -> bytes:
        """The result, or the exception, or that the result is no data, as a message."""
        try:
            result = action()
        except BaseException as error:
            try:
                text = str(error)[:2000]
            except Exception:
                text = ""
            return dump(["raised", [kind.__name__ for kind in type(error).__mro__], text])
        try:
            return dump(["returned", result], self.hand_out)
        except Exception as error:
            return dump(["unfit", f"{type(error).__name__}: {error}"[:2000]])

    def hand_out(self, value: Any) -> Any:
        """Refer to what is no plain data by number, and by what can be done with it."""
        if isinstance(value, type):
            kind = "exception" if issubclass(value, Exception) else "class"
            names = [one.__name__ for one in value.__mro__]
        else:
            kind = "iterator" if isinstance(value, Iterator) else "callable" if callable(value) else "object"
            if isinstance(value, types.ModuleType):
                raise NotPlain("a module is no plain data")
            if isinstance(value, (range, type({}.keys()), type({}.values()), type({}.items()))):
                return pack(list(value), self.hand_out)
            names = [type(value).__name__]
        self.objects.append(value)
        return [kind, len(self.objects) - 1, *names]

    def take_in(self, tag: str, number: int, *_: Any) -> Any:
        """The object of that number."""
        return self.objects[number]

    def answer(self, request: list[Any]) -> Any:
        """Do what the examiner asks: `[operation, packed arguments...]`."""
        operation, *packed = request
        first, *rest = (unpack(one, self.take_in) for one in packed)
        if operation == "look":
            return getattr(self.module, first)
        if operation == "names":
            return [name for name in vars(self.module) if not name.startswith("_")]
        if operation == "call":
            positional, named = rest
            result = first(*positional, **named)
            # What was changed in place is of interest as well.
            changed = [one if isinstance(one, (list, dict, set, bytearray)) else None for one in positional]
            return [result, changed]
        if operation == "get":
            return getattr(first, *rest)
        if operation == "next":
            return next(first)
        if operation == "iterate":
            return iter(first)
        simple: dict[str, Callable[..., Any]] = {
            "length": len,
            "item": lambda one, key: one[key],
            "equal": lambda one, other: bool(one == other),
            "truth": bool,
            "text": str,
        }
        return simple[operation](first, *rest)


if __name__ == "__main__":
    main(sys.argv[1])
