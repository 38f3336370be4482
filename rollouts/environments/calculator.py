"""A calculator for models: exact arithmetic on an expression that is parsed, never executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

LONGEST_EXPRESSION = 200
LARGEST_BITS = 2048
"""Of a numerator or denominator. Numbers beyond it take a model's whole context, and soon all of the time."""

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
}


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression exactly.

    Args:
        expression: Numbers with + - * / // % ** and parentheses.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    expression = expression.strip()
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("this is not an arithmetic expression") from None
    return _as_text(_value(tree.body, expression))


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _checked(_number(ast.get_source_segment(source, node) or ""))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and (isinstance(node.op, ast.Pow) or type(node.op) in _BINARY):
        left, right = _value(node.left, source), _value(node.right, source)
        try:
            return _checked(
                _power(left, right) if isinstance(node.op, ast.Pow) else _BINARY[type(node.op)](left, right)
            )
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
    raise ValueError("only numbers, + - * / // % ** and parentheses can be calculated")


def _number(literal: str) -> Fraction:
    """A number as it is written: `0.1` is a tenth, not the float nearest to it."""
    text = literal.lower().replace("_", "")
    mantissa, _, exponent = text.partition("e")
    if text.startswith(("0x", "0o", "0b")) or (exponent and abs(int(exponent)) > LARGEST_BITS // 4):
        raise ValueError(f"{literal} is not a decimal number of moderate size")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("an exponent is a whole number")
    bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if bits > 1 and abs(exponent) * (bits - 1) > LARGEST_BITS:
        raise ValueError("the result is too large")
    # 1, 0 and -1 have every power; Fraction would still multiply as often as it is told to.
    if bits <= 1:
        exponent = exponent % 2 if base < 0 else min(max(exponent, Fraction(-1)), Fraction(1))
    return base ** int(exponent)


def _checked(value: Fraction) -> Fraction:
    if max(abs(value.numerator).bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise ValueError("the result is too large")
    return value


def _as_text(value: Fraction) -> str:
    """`12`, `0.25`, or `1/3` where no decimal ends."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, decimals = value.denominator, 0
    while rest % 2 == 0 or rest % 5 == 0:
        rest //= 10 if rest % 10 == 0 else 2 if rest % 2 == 0 else 5
        decimals += 1
    if rest > 1 or decimals > 30:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**decimals // value.denominator).rjust(decimals + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-decimals]}.{digits[-decimals:]}"
