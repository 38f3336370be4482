"""Whether the options of a reward, from a recipe, fit it."""

from __future__ import annotations

import inspect
import math
import sys
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from posttrain.errors import BadInput
from rewards.rubric import is_rubric


def check_parameters(name: str, function: Callable[..., Any], options: Mapping[str, Any], where: str) -> None:
    """The options fit the function's signature, and for the project's own rewards also their meaning.

    Raises:
        BadInput: they do not.
    """
    try:
        inspect.signature(function).bind(None, "", [], "stop", **options)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{where}: {name} does not take these options: {error}") from error
    checks: dict[str, Callable[[str, Mapping[str, Any], str], None]] = {
        "length": _length,
        "effort_length": _effort_length,
        "exact": _extract,
        "numeric": _numeric,
        "format": _format,
        "json_format": _json_format,
        "language": _language,
        "code": _code,
        "rubric": _rubric,
    }
    if name in checks:
        checks[name](name, options, where)


def _is_number(value: object, low: float, high: float = math.inf) -> bool:
    """A finite number above `low` and at most `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and low < value <= high


def _length(name: str, options: Mapping[str, Any], where: str) -> None:
    target, limit = options["target"], options["limit"]
    if not (isinstance(target, int) and isinstance(limit, int) and 0 <= target < limit):
        raise BadInput(f"{where}: length needs whole numbers 0 <= target < limit, not {target!r} and {limit!r}")


def _effort_length(name: str, options: Mapping[str, Any], where: str) -> None:
    if "reasoning_tokens" in options:
        raise BadInput(f"{where}: the reasoning_tokens of effort_length are counted; leave them out")
    for key in ("k0", "tau", "norm", "cap"):
        if not _is_number(options[key], 0):
            raise BadInput(f"{where}: the {key} of effort_length is a number above 0, not {options[key]!r}")
    for key in ("effort", "effort_min"):
        if options.get(key) is not None and not _is_number(options[key], -math.inf):
            raise BadInput(f"{where}: the {key} of effort_length is a number, not {options[key]!r}")


def _pattern(name: str, pattern: Any, where: str) -> Any:
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise BadInput(f"{where}: the pattern {pattern!r} is no regular expression: {error}") from error


def _extract(name: str, options: Mapping[str, Any], where: str) -> None:
    pattern = options.get("extract")
    if pattern is not None and _pattern(name, pattern, where).groups != 1:
        raise BadInput(f"{where}: the `extract` of {name} has one group, for the answer: {pattern!r} has not")


def _numeric(name: str, options: Mapping[str, Any], where: str) -> None:
    _extract(name, options, where)
    tolerance = options.get("tolerance", 0.0)
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise BadInput(f"{where}: the tolerance of numeric is a number in [0, 1), not {tolerance!r}")


def _format(name: str, options: Mapping[str, Any], where: str) -> None:
    _pattern(name, options["pattern"], where)


def _texts(name: str, key: str, value: Any, where: str) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise BadInput(f"{where}: the {key} of {name} is a list of texts, not {value!r}")


def _json_format(name: str, options: Mapping[str, Any], where: str) -> None:
    _texts(name, "keys", options.get("keys", ()), where)


@lru_cache(maxsize=1)
def _scripts() -> frozenset[str]:
    """First words of the names of all letters."""
    letters = filter(str.isalpha, map(chr, range(sys.maxunicode)))
    return frozenset(unicodedata.name(one, "").partition(" ")[0] for one in letters)


def _language(name: str, options: Mapping[str, Any], where: str) -> None:
    _texts(name, "scripts", options["scripts"], where)
    if not options["scripts"] or not _scripts().issuperset(options["scripts"]):
        example = "LATIN, CYRILLIC, GREEK, ARABIC, HEBREW, DEVANAGARI, CJK, HIRAGANA, KATAKANA, HANGUL"
        raise BadInput(f"{where}: the scripts of language are some of {example}, ..., not {options['scripts']!r}")


def _code(name: str, options: Mapping[str, Any], where: str) -> None:
    for key in ("partial", "isolated"):
        if not isinstance(options.get(key, True), bool):
            raise BadInput(f"{where}: the {key} of code is true or false, not {options[key]!r}")
    if not _is_number(options.get("seconds", 1), 0, 3600):
        raise BadInput(f"{where}: the seconds of code are a number above 0, at most 3600, not {options['seconds']!r}")
    memory = options.get("memory_mib", 64)
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 64:
        raise BadInput(f"{where}: the memory_mib of code are a whole number of at least 64, not {memory!r}")
    _require_isolation(options, where)


def _require_isolation(options: Mapping[str, Any], where: str) -> None:
    from rewards import sandbox

    try:
        missing = sandbox.uncovered() if options.get("isolated", True) else []
    except sandbox.SandboxError as error:
        raise BadInput(f"{where}: code cannot be run here: {error}") from error
    if missing:
        raise BadInput(
            f"{where}: nothing here keeps programs from {', '.join(missing)} ({sandbox.protections().describe()}); "
            "run on a system that allows namespaces or seccomp and Landlock, or set `isolated: false` if you trust "
            "what the model may write"
        )


def _rubric(name: str, options: Mapping[str, Any], where: str) -> None:
    if not callable(options["judge"]):
        raise BadInput(
            f"{where}: the judge of rubric is `package.module:function`, or {{actor: a judge domain, votes: how many}} "
            f"for the model itself, not {options['judge']!r}"
        )
    if options.get("criteria") is not None and not is_rubric(options["criteria"]):
        raise BadInput(
            f"{where}: the criteria of rubric are a list of {{criterion: text, points: number above 0}}, not "
            f"{options['criteria']!r}"
        )
