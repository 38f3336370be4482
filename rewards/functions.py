"""The rewards: each judges one answer and returns one number. Parameters come from the recipe.

Every function, the user's own included, has the signature

    def reward(problem, text, token_ids, finish_reason, **parameters) -> float     (1: right, 0: wrong)

    problem:        posttrain.data.Problem, with `answer` (reference) and `entry` (what the source says of it)
    text:           the answer as text, without the end token
    token_ids:      its tokens as sampled, with the end token if there was one
    finish_reason:  "stop" (ended by itself) or "length" (cut off)
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from posttrain.data.problems import Problem

REGEX_SECONDS = 1.0
"""Some patterns take exponential time on some texts."""
MATH_SECONDS = 5


def exact(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    """1 if the text is the reference answer, white space around it aside; else 0."""
    return float(text.strip() == problem.answer.strip())


@lru_cache(maxsize=64)
def _verifier_of(task: str, params_json: str) -> Callable[..., float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(params_json)).score_answer


def verifier(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    """reasoning-gym's own score of the answer, 0 to 1. Some tasks give partial credit; only 1 is correct.

    For a task with one right answer `exact` is the stricter reward: `spell_backward`, for one, forgives what
    follows the right letters and the case of all.
    """
    origin = problem.entry.get("reasoning_gym")
    if origin is None:
        raise ValueError("the problem does not come from reasoning_gym, so it has no verifier")
    score = _verifier_of(origin["task"], json.dumps(origin["params"], sort_keys=True))
    return float(score(text.strip(), problem.entry))


_NUMBER = re.compile(r"[+-]?((\d{1,3}(,\d{3})+|\d+)(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_LONGEST_NUMBER = 64


def _number(text: str) -> Fraction | None:
    """The value of `1,234.5`, `-3e2` or `3/4`, exactly; None if the text is no number."""
    text = text.strip().removeprefix("$").removesuffix(".")
    if len(text) > _LONGEST_NUMBER:
        return None
    parts = [part.strip() for part in text.split("/")]
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    values = [Fraction(part.replace(",", "")) for part in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None


def numeric(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str, tolerance: float = 0.0) -> float:
    """1 if the text is a number equal to the reference, within `tolerance` relative to the reference; else 0."""
    reference, value = _number(problem.answer), _number(text)
    if reference is None:
        raise ValueError(f"the reference answer {problem.answer!r} is not a number")
    return float(value is not None and abs(value - reference) <= Fraction(tolerance) * abs(reference))


def format(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str, *, pattern: str) -> float:
    """1 if the whole text, white space around it aside, matches the regular expression; else 0."""
    import regex  # unlike `re`, it can limit its time

    return float(regex.fullmatch(pattern, text.strip(), timeout=REGEX_SECONDS) is not None)


def length(
    problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str, *, target: int, limit: int
) -> float:
    """0 up to `target` tokens, from there linearly down to -1 at `limit` tokens and beyond."""
    return -min(1.0, max(0.0, (len(token_ids) - target) / (limit - target)))


def math_verify(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    """1 if the answer is mathematically equal to the reference (LaTeX or plain expressions); else 0."""
    # Its time limit is an alarm signal, and without a limit a tower of powers would stop the run.
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math_verify can limit its time in a process's main thread only")
    from math_verify import parse, verify

    reference = parse(problem.answer, parsing_timeout=MATH_SECONDS)
    if not reference:
        raise ValueError(f"the reference answer {problem.answer!r} is not mathematics")
    answer = parse(text, parsing_timeout=MATH_SECONDS)
    return float(verify(reference, answer, timeout_seconds=MATH_SECONDS))
