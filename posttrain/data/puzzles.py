"""Small problems for small models, as `generator` of a source: clauses to be judged, and programs to be written."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from string import ascii_letters
from typing import Any

_OPERATORS: dict[str, Callable[[int, int], int]] = {"&": int.__and__, "|": int.__or__, "^": int.__xor__}


def true_clauses(random: Random, clauses: int = 8) -> dict[str, Any]:
    """How many clauses hold: `1&0 0|1 1^1 1|1#` → `2`."""
    drawn = [(random.randint(0, 1), random.choice([*_OPERATORS]), random.randint(0, 1)) for _ in range(clauses)]
    text = " ".join(f"{left}{operator}{right}" for left, operator, right in drawn)
    return {"prompt": f"{text}#", "answer": sum(_OPERATORS[operator](left, right) for left, operator, right in drawn)}


_PLAIN: dict[str, tuple[str, Callable[[str], str]]] = {
    "reverse": ("[::-1]", lambda text: text[::-1]),
    "skip": ("[::2]", lambda text: text[::2]),
    "upper": (".upper()", str.upper),
    "swap": (".swapcase()", str.swapcase),
}
_COUNTED: dict[str, tuple[str, Callable[[str, int], str]]] = {
    "first": ("[:{}]", lambda text, count: text[:count]),
    "last": ("[-{}:]", lambda text, count: text[-count:]),
    "drop": ("[{}:]", lambda text, count: text[count:]),
    "chop": ("[:-{}]", lambda text, count: text[:-count]),
}
LARGEST_COUNT = 6
TESTS = 3


def string_function(random: Random, min_steps: int = 2, max_steps: int = 3) -> dict[str, Any]:
    """What a function does to a text, to be written in Python: `drop 2, reverse` → `s[2:][::-1]`.

    The answer goes behind `f = lambda s: `; unit tests compare `f` with what is right on texts of their own.
    """
    while True:
        names = random.choices([*_PLAIN, *_COUNTED], k=random.randint(min_steps, max_steps))
        counts = [random.randint(1, LARGEST_COUNT) for _ in names]
        texts = ["".join(random.choices(ascii_letters, k=random.randint(24, 30))) for _ in range(TESTS)]
        results = [_carried_out(text, names, counts) for text in texts]
        if all(results):  # a function that leaves nothing has many programs
            break
    steps = [name if name in _PLAIN else f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    code = [
        _PLAIN[name][0] if name in _PLAIN else _COUNTED[name][0].format(count)
        for name, count in zip(names, counts, strict=True)
    ]
    tests = [f"assert f({text!r}) == {result!r}" for text, result in zip(texts, results, strict=True)]
    return {
        "prompt": ", ".join(steps),
        "answer": "s" + "".join(code),
        "prefix": "f = lambda s: ",
        "tests": "\n".join(tests),
    }


def _carried_out(text: str, names: list[str], counts: list[int]) -> str:
    for name, count in zip(names, counts, strict=True):
        text = _PLAIN[name][1](text) if name in _PLAIN else _COUNTED[name][1](text, count)
    return text
