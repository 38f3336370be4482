"""Arithmetic beyond a small model's head: products and sums of numbers with many digits, for the calculator tool.

A tiny model learns sums of small numbers by heart and does not learn to multiply five digits by five: what it can learn
is to write the expression into a call and to copy the result. The answers are exact whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from posttrain.data.generators import draw_apart
from posttrain.data.problems import DomainData, Problem, Split, make_problem, place
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

    def draw(random: Random) -> Problem:
        expression, value = _calculation(random, min_digits, max_digits, shapes)
        messages = [{"role": "user", "content": f"{expression}="}]
        return make_problem(name, messages, str(value), {"expression": expression}, system)

    return draw_apart(name, "calculations", draw, sizes, seed)


def demonstrate(problem: Problem, reasoning: str = "") -> list[dict[str, Any]]:
    """A conversation that solves a problem with the tool `calculator`: what the model is shown before it tries.

    The tool is not declared in it: declare it by `posttrain.data.v4.with_tools`, or encode with `known_tools`. In modes
    that think, the problem's reasoning leads to the call.
    """
    reasoning = reasoning or problem.reasoning
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
    return [*problem.messages, {"role": "assistant", "content": problem.answer, "reasoning": problem.reasoning}]
