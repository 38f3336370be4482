"""Plain Python data as JSON and back: nothing that is read can run, compare or compute."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

LONGEST_MESSAGE = 4 * 2**20
"""Bytes."""
_WIDE = 2**53


class NotPlain(TypeError):
    """A value that is no plain data."""


def dump(value: Any, handle_of: Any = None) -> bytes:
    """One line. `handle_of(value)` gives a value that is no plain data a tagged name, or raises NotPlain."""
    return json.dumps(pack(value, handle_of), separators=(",", ":")).encode() + b"\n"


def pack(value: Any, handle_of: Any = None) -> Any:
    """What JSON knows stays; the rest becomes `[tag, ...]`, so lists become `["list", ...]`.

    Subclasses become what they are subclasses of: a `Counter` is a dict, and no overridden comparison survives.
    """
    if value is None or value is True or value is False or type(value) is str:
        return value
    if isinstance(value, int):
        value = int.__int__(value)
        return value if -_WIDE < value < _WIDE else ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float.hex(float.__float__(value))]
    if isinstance(value, str):
        return str.__str__(value)
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in kinds:
        if isinstance(value, kind):
            return [kind.__name__, *[pack(one, handle_of) for one in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", *[[pack(key, handle_of), pack(one, handle_of)] for key, one in dict.items(value)]]
    if isinstance(value, (bytes, bytearray)):
        return [bytes.__name__ if isinstance(value, bytes) else bytearray.__name__, value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if _is(value, "fractions", "Fraction"):
        return ["fraction", hex(value.numerator), hex(value.denominator)]
    if _is(value, "decimal", "Decimal"):
        return ["decimal", str(value)]
    if handle_of is None:
        raise NotPlain(f"{type(value).__name__} is no plain data")
    return handle_of(value)


def _is(value: Any, module: str, name: str) -> bool:
    """Whether it is of a class that most programs do not import."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def unpack(packed: Any, object_of: Any = None) -> Any:
    """The value. `object_of(tag, *arguments)` makes one of any other tag.

    Raises:
        NotPlain: nothing that `pack` could have made.
    """
    if packed is None or isinstance(packed, (bool, int, str)):
        return packed
    if not isinstance(packed, list) or not packed or not isinstance(packed[0], str):
        raise NotPlain(f"cannot be read: {str(packed)[:100]}")
    tag, *rest = packed
    if tag in ("list", "tuple", "set", "frozenset"):
        kinds: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
        return kinds[tag](unpack(one, object_of) for one in rest)
    if tag == "dict":
        return {unpack(key, object_of): unpack(one, object_of) for key, one in rest}
    readers: dict[str, Any] = {
        "int": lambda text: int(text, 16),
        "float": float.fromhex,
        "complex": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
        "bytes": bytes.fromhex,
        "bytearray": bytearray.fromhex,
        "fraction": lambda above, below: import_module("fractions").Fraction(int(above, 16), int(below, 16)),
        "decimal": lambda text: import_module("decimal").Decimal(text),
    }
    if tag in readers:
        return readers[tag](*rest)
    if object_of is None:
        raise NotPlain(f"cannot be read: {tag!r}")
    return object_of(tag, *rest)
