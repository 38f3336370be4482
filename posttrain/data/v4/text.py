"""Text with special tokens in it, where the spelling of a special token is not one.

A conversation is laid out as `Part`s. For reading it back, parts are sealed: one string in which every special token
is one character that no text can hold (half of a surrogate pair), so that plain regular expressions can tell the token
`<think>` from the seven characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from posttrain.data.layout import SPECIAL_TOKENS

_FIRST_SEAL = 0xDC00
SEALS = {token: chr(_FIRST_SEAL + index) for index, token in enumerate(SPECIAL_TOKENS)}
"""Special token → the character that stands for it in sealed text."""
_TOKENS = {seal: token for token, seal in SEALS.items()}
ANY_SEAL = f"[{chr(_FIRST_SEAL)}-{chr(_FIRST_SEAL + len(SPECIAL_TOKENS) - 1)}]"
"""A character class of regular expressions: any special token."""
_SPELLED = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
HALF_PAIR = re.compile("[\ud800-\udfff]")
"""What JSON can write (`"\\ud800"`) and no tokenizer can: half of a surrogate pair."""


class Part(NamedTuple):
    """A piece of a conversation: one special token, or text in which nothing is special."""

    text: str
    special: bool
    by_model: bool = False
    """The model itself writes it: what supervised training learns."""


def marked(text: str, by_model: bool = False) -> list[Part]:
    """Parts of a text of the format's own, where the spelling of a special token does mean the token."""
    parts: list[Part] = []
    position = 0
    for match in _SPELLED.finditer(text):
        parts += [Part(text[position : match.start()], False, by_model), Part(match.group(), True, by_model)]
        position = match.end()
    parts.append(Part(text[position:], False, by_model))
    return [part for part in parts if part.text]


def seal(parts: Iterable[Part]) -> str:
    """One string of parts; every special token is one character of its own."""
    return "".join(SEALS.get(part.text, part.text) if part.special else part.text for part in parts)


def seal_text(text: str) -> str:
    """Seal text that is all there is of a conversation: every spelled special token counts as the token."""
    return _SPELLED.sub(lambda match: SEALS[match.group()], text)


def unseal(sealed: str) -> str:
    """Sealed text as it reads."""
    return "".join(_TOKENS.get(character, character) for character in sealed)


def offset(sealed: str, position: int) -> int:
    """Where in `unseal(sealed)` the character at `position` of the sealed text begins."""
    return len(unseal(sealed[:position]))
