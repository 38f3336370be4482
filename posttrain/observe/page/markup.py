"""HTML and SVG elements that cannot be malformed: text is escaped unless an element made it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

VOID = frozenset({"meta", "wbr"})
SVG_VOID = frozenset({"line", "rect", "circle", "path", "polyline"})
"""Elements that never have content here; SVG's are written self-closing."""
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that no HTML document may hold; a model may well write them."""


class Markup(str):
    """Finished markup, which is put into an element as it is."""


Content = str | int | float | None | Iterable["Content"]


def element(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Markup:
    """`<name attributes>content</name>`.

    An attribute is left out when None or False; a trailing `_` is dropped and other `_` become `-` (`class_`,
    `aria_label`). Content may be text (escaped), numbers, markup, None (nothing) or nested iterables of these.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.removesuffix("_").replace("_", "-") if key != "viewBox" else key
        written.append(f" {key}" if value is True else f' {key}="{_safe(value)}"')
    opening = f"<{name}{''.join(written)}"
    if name in VOID:
        return Markup(opening + ">")
    if name in SVG_VOID:
        return Markup(opening + "/>")
    return Markup(f"{opening}>{joined(*content)}</{name}>")


def joined(*content: Content) -> Markup:
    """Contents one after the other, text escaped."""
    parts = []
    for item in content:
        if item is None:
            continue
        if isinstance(item, Markup):
            parts.append(str(item))
        elif isinstance(item, str | int | float):
            parts.append(_safe(item))
        else:
            parts.append(str(joined(*item)))
    return Markup("".join(parts))


def _safe(value: str | int | float) -> str:
    return escape(FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)))
