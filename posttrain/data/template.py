"""Prompt templates: `"{metadata[expression]}="` filled from a generated problem. Lookups only, nothing is executed."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from posttrain.errors import BadInput

NAMES = ("question", "metadata")
"""What of a problem a prompt may show. Not its answer."""

_FIELD = re.compile(r"(?P<name>[a-z_]+)(?P<path>(\[[^\[\]]+\])*)")


def _lookup(field: str, entry: Mapping[str, Any]) -> Any:
    """Follow `metadata[numbers][0]` into `entry`: keys and list positions, never attributes."""
    match = _FIELD.fullmatch(field)
    if match is None or match["name"] not in NAMES:
        raise BadInput(f"{{{field}}} is not a field: write {{question}} or {{metadata[key]}}")
    value: Any = entry[match["name"]]
    for key in re.findall(r"\[([^\[\]]+)\]", match["path"]):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, (list, tuple)) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise BadInput(f"{{{field}}}: there is no {key!r}; there is {_what_there_is(value)}")
    return value


def _what_there_is(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(map(str, value)) or "nothing"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a single value ({value!r})"


def fill_template(template: str, entry: Mapping[str, Any]) -> str:
    """Fill `{question}` and `{metadata[key]}` fields; `{{` and `}}` are braces.

    Args:
        entry: a reasoning-gym problem: `question` (text) and `metadata` (a dictionary).

    Raises:
        BadInput: a field that is not there, or anything but a plain field (`!r`, `:>10`, attributes).
    """
    filled: list[str] = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise BadInput(f"the template {template!r} is malformed: {error}") from error
    for text, field, format_spec, conversion in pieces:
        filled.append(text)
        if field is None:
            continue
        if format_spec or conversion:
            raise BadInput(f"the template {template!r} may hold plain fields only, without `!` or `:`")
        filled.append(str(_lookup(field, entry)))
    return "".join(filled)
