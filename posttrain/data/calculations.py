"""Arithmetic beyond a small model's head: products and sums of numbers with many digits, for the calculator tool.

A tiny model learns sums of small numbers by heart and does not learn to multiply five digits by five: what it can learn
is to write the expression into a call and to copy the result. The answers are exact whole numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from posttrain.data.problems import DomainData, Problem, Split, make_problem, place, split_key, split_of
from posttrain.data.v4 import ToolCall
from posttrain.errors import BadInput

SHAPES = ("a*b", "a*b+c", "a*b-c", "(a+b)*c")


def _calculation(random: Random, min_digits: int, max_digits: int, shapes: Sequence[str]) -> tuple[str, int]:
    """An expression and its value."""
    a, b, c = (
        random.randrange(10 ** (digits - 1), 10**digits)
        for digits in (random.randint(min_digits, max_digits) for _ in range(3))
    )
    shape = random.choice(shapes)
    value = {"a*b": a * b, "a*b+c": a * b + c, "a*b-c": a * b - c, "(a+b)*c": (a + b) * c}[shape]
    return shape.replace("a", str(a)).replace("b", str(b)).replace("c", str(c)), value


def _stream(
    name: str, seed: str, min_digits: int, max_digits: int, system: str | None, shapes: Sequence[str]
) -> Iterator[Problem]:
    random = Random(hashlib.sha256(f"calculations/{seed}".encode()).digest())
    while True:
        expression, value = _calculation(random, min_digits, max_digits, shapes)
        messages = [{"role": "user", "content": f"{expression}="}]
        yield make_problem(name, messages, str(value), {"expression": expression}, system)


def generate_calculations(
    name: str,
    sizes: Mapping[Split, int],
    seed: int,
    min_digits: int = 3,
    max_digits: int = 5,
    system: str | None = None,
    shapes: Sequence[str] = SHAPES,
) -> DomainData:
    """Draw a domain's problems, none in two places: as `posttrain.data.sources.generate` does for reasoning-gym.

    Hold-out and selection are the same for every seed.

    Args:
        sizes: How many problems for `train`, `selection` and `holdout`.
        min_digits: Of each number in an expression.
        shapes: Of `SHAPES`, equally often.

    Raises:
        BadInput: digits out of range, or fewer different problems than asked for.
    """
    if not 2 <= min_digits <= max_digits <= 30:
        raise BadInput(f"domains.{name}: needs 2 <= min_digits <= max_digits <= 30, not {min_digits} and {max_digits}")
    found: dict[Split, list[Problem]] = {"train": [], "selection": [], "holdout": []}
    seen: set[str] = set()
    streams: dict[str, tuple[Split, ...]] = {"evaluation": ("selection", "holdout"), f"train/{seed}": ("train",)}
    for stream_seed, splits in streams.items():
        without_news = 0
        for problem in _stream(name, stream_seed, min_digits, max_digits, system, shapes):
            if all(len(found[split]) >= sizes[split] for split in splits):
                break
            split = split_of(split_key(problem.messages))
            without_news += 1
            if split in splits and len(found[split]) < sizes[split] and problem.id not in seen:
                seen.add(problem.id)
                found[split].append(problem)
                without_news = 0
            if without_news > 2000 + 40 * len(seen):  # of n problems, the last unseen one takes n draws on average
                counts = ", ".join(f"{len(found[one])} of {sizes[one]} for {one}" for one in splits)
                raise BadInput(f"domains.{name}: there are too few different calculations: {counts}")
    return DomainData(**found)


def demonstrate(problem: Problem, reasoning: str = "") -> list[dict[str, Any]]:
    """A conversation that solves a problem with the tool `calculator`: what the model is shown before it tries.

    The tool is not declared in it: declare it by `posttrain.data.v4.with_tools`, or encode with `known_tools`.
    """
    call = ToolCall("calculator", {"expression": problem.entry["expression"]})
    calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call.message()]}
    return [
        *problem.messages,
        {**calling, "reasoning": reasoning} if reasoning else calling,
        {"role": "tool", "content": problem.answer},
        {"role": "assistant", "content": problem.answer},
    ]


def demonstrate_half(problem: Problem) -> list[dict[str, Any]]:
    """As `demonstrate` for half of the problems; the others are answered at once, which only a calculator could.

    A model that learns from these knows the tool and uses it every other time: that it pays is left to be found out.
    """
    if place(f"demonstration: {problem.id}") < 0.5:
        return demonstrate(problem)
    return [*problem.messages, {"role": "assistant", "content": problem.answer}]
