"""The rewards: each judges one answer and returns one number. Parameters come from the recipe.

Every function, the user's own included, has the signature (or takes lists of all: `rewards.batches.batched`)

    def reward(problem, text, token_ids, finish_reason, **parameters) -> float     (1: right, 0: wrong)

    problem:        posttrain.data.Problem, with `answer` (reference) and `entry` (what the source says of it)
    text:           the answer as text, without the end token
    token_ids:      its tokens as sampled, with the end token if there was one
    finish_reason:  "stop" (ended by itself) or "length" (cut off)

In a domain with an environment the text is that of the last turn, and empty if the episode came to no answer; the
tokens are those of all the model's turns; and the finish reason may also be "turn_limit".
"""

from __future__ import annotations

import json
import math
import re
import threading
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rewards.batches import counts_reasoning, needs
from rewards.code import code as code
from rewards.rubric import rubric as rubric

if TYPE_CHECKING:
    from collections.abc import Callable

    from posttrain.data.problems import Problem

REGEX_SECONDS = 1.0
"""Some patterns take exponential time on some texts."""
MATH_SECONDS = 5


def exact(
    problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str, *, extract: str | None = None
) -> float:
    """1 if the text is the reference answer, white space around it aside; else 0.

    Args:
        extract: a regular expression with one group, see `extracted`.
    """
    return float(extracted(text, extract) == extracted(problem.answer, extract))


def extracted(text: str, pattern: str | None) -> str:
    """What the pattern's group holds in its last match, as in `#### (.*)`; the whole text without pattern or match."""
    found = None
    if pattern is not None:
        import regex  # unlike `re`, it can limit its time

        for match in regex.finditer(pattern, text, timeout=REGEX_SECONDS):
            found = match[1]
    return (text if found is None else found).strip()


@lru_cache(maxsize=64)
def _verifier_of(task: str, params_json: str) -> Callable[..., float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(params_json)).score_answer


def _no_verifier(problem: Problem, **_: Any) -> str | None:
    if "reasoning_gym" not in problem.entry:
        return "the problem does not come from reasoning_gym, so it has no verifier"
    return None


@needs(_no_verifier)
def verifier(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    """reasoning-gym's own score of the answer, 0 to 1. Some tasks give partial credit; only 1 is correct.

    For a task with one right answer `exact` is the stricter reward: `spell_backward`, for one, forgives what
    follows the right letters and the case of all.
    """
    complaint = _no_verifier(problem)
    if complaint is not None:
        raise ValueError(complaint)
    origin = problem.entry["reasoning_gym"]
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


def _no_number(problem: Problem, extract: str | None = None, **_: Any) -> str | None:
    if _number(extracted(problem.answer, extract)) is None:
        return f"the reference answer {problem.answer!r} is not a number"
    return None


@needs(_no_number)
def numeric(
    problem: Problem,
    text: str,
    token_ids: Sequence[int],
    finish_reason: str,
    tolerance: float = 0.0,
    extract: str | None = None,
) -> float:
    """1 if the text is a number equal to the reference, within `tolerance` relative to the reference; else 0.

    Args:
        extract: a regular expression with one group, see `extracted`.
    """
    reference, value = _number(extracted(problem.answer, extract)), _number(extracted(text, extract))
    if reference is None:
        raise ValueError(f"the reference answer {problem.answer!r} is not a number")
    return float(value is not None and abs(value - reference) <= Fraction(tolerance) * abs(reference))


def _as_json(text: str) -> object:
    """The value of a JSON text, in a code fence or not; raises ValueError. NaN and infinities are no JSON."""

    def refuse(name: str) -> object:
        raise ValueError(f"{name} is no JSON")

    fenced = _FENCED.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("too deep") from None


_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def _same_json(one: object, other: object) -> bool:
    """Equal as JSON: unlike in Python, true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_json, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_json(value, other[key]) for key, value in one.items())
    return one == other


def json_equal(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    """1 if the text is JSON with the value of the reference, in a code fence or not, in any order of keys; else 0."""
    try:
        reference = _as_json(problem.answer)
    except ValueError as error:
        raise ValueError(f"the reference answer {problem.answer!r} is no JSON: {error}") from error
    try:
        return float(_same_json(_as_json(text), reference))
    except ValueError:
        return 0.0


def json_format(
    problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str, *, keys: Sequence[str] = ()
) -> float:
    """1 if the text is JSON, in a code fence or not, and with `keys` an object that has all of them; else 0."""
    try:
        value = _as_json(text)
    except ValueError:
        return 0.0
    return float(not keys or (isinstance(value, dict) and all(key in value for key in keys)))


def format(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str, *, pattern: str) -> float:
    """1 if the whole text, white space around it aside, matches the regular expression; else 0."""
    import regex  # unlike `re`, it can limit its time

    return float(regex.fullmatch(pattern, text.strip(), timeout=REGEX_SECONDS) is not None)


def length(
    problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str, *, target: int, limit: int
) -> float:
    """0 up to `target` tokens, from there linearly down to -1 from `limit` on (DAPO, arXiv 2503.14476, eq. 13)."""
    return -min(1.0, max(0.0, (len(token_ids) - target) / (limit - target)))


@counts_reasoning
def effort_length(
    problem: Problem,
    text: str,
    token_ids: Sequence[int],
    finish_reason: str,
    *,
    k0: float,
    tau: float,
    norm: float,
    cap: float,
    effort_min: float = 1.0,
    effort: float | None = None,
    reasoning_tokens: int | None = None,
) -> float:
    """DeepSeek-V4.1's length penalty: -min(C, k(b) * tokens / L) with k(b) = k0 * exp(-(b - b_min) / tau).

    The harder the model was told to think, the less a token costs. DeepSeek counts reasoning tokens and has b from 1
    to 100; the coefficients were not published. Answers without reasoning are counted whole.

    Args:
        k0, tau: the penalty's strength at the lowest effort, and the effort over which it falls to 1/e.
        norm: L, the tokens that cost k(b).
        cap: C, the most that an answer can lose.
        effort_min: b_min.
        effort: b; default: the problem's own, `effort` in its row.
    """
    asked = problem.entry.get("effort") if effort is None else effort
    if isinstance(asked, bool) or not isinstance(asked, (int, float)):
        raise ValueError(f"the problem's `effort` is a number, not {asked!r}")
    tokens = len(token_ids) if reasoning_tokens is None else reasoning_tokens
    return -min(cap, k0 * math.exp(-(asked - effort_min) / tau) * tokens / norm)


_NOT_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"  # code
    r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\[(?:(?!\\\[).)*?\\\]|\\\((?:(?!\\\().)*?\\\)",  # formulas
    re.DOTALL,
)


def language(
    problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str, *, scripts: Sequence[str]
) -> float:
    """Share of the letters that belong to the wanted language's scripts; 1 without letters. Code and formulas aside.

    DeepSeek-R1 (arXiv 2501.12948, 2.3.2) takes the share of words; letters also serve languages without spaces.

    Args:
        scripts: first words of Unicode character names, such as `LATIN`, `CYRILLIC`, or `CJK`, `HIRAGANA`, `KATAKANA`.
    """
    letters = [one for one in _NOT_LANGUAGE.sub(" ", text) if one.isalpha()]
    wanted = sum(unicodedata.name(one, "").partition(" ")[0] in scripts for one in letters)
    return wanted / len(letters) if letters else 1.0


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
