"""Verdicts on programs: by unit tests, or by what they print."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rewards.sandbox.launch import DEFAULT_LIMITS, Execution, Limits, run, run_together

_START = "import os, sys\nhere = os.path.dirname(os.path.abspath(__file__))\nsys.path.insert(0, here)\n"
_SOLUTION = _START + "from inside.solution import main\nmain(here + '/answer.py')\n"
_EXAMINER = _START + "from inside.examiner import main\nmain(here + '/tests.py', sys.argv[1])\n"


@dataclass(frozen=True)
class Case:
    """What a program reads and must print."""

    stdin: str
    stdout: str
    """Compared without white space at the ends of lines and of the whole."""


@dataclass(frozen=True)
class Verdict:
    """What tests say of a program."""

    passed: int
    tests: int
    problems: tuple[str, ...]
    """Name and problem of each test that did not pass, of those that ran."""

    @property
    def share(self) -> float:
        """Of the tests that passed, 0 to 1."""
        return self.passed / self.tests


def examine(
    program: str, tests: str, entry_point: str = "", limits: Limits = DEFAULT_LIMITS, isolated: bool = True
) -> Verdict:
    """Run unit tests against a program. Program and tests are in jails of their own; the program sees no test.

    Args:
        program: its text. It is loaded as module `solution`, whose names the tests can use with or without import.
        tests: top-level asserts, functions `test_...()`, `unittest` classes or `check(candidate)`, in any mixture.
        entry_point: name of the function that `check` is given.

    Raises:
        ValueError: the tests are no Python, or there are none.
        NotIsolated, SandboxError: as `sandbox.run`.
    """
    requests_reader, requests_writer = os.pipe()
    replies_reader, replies_writer = os.pipe()
    verdict_reader, verdict_writer = os.pipe()
    solution = Execution(
        {**_inside(), "main.py": _SOLUTION, "answer.py": program},
        limits=limits,
        isolated=isolated,
        channels=(requests_reader, replies_writer),
    )
    examiner = Execution(
        {**_inside(), "main.py": _EXAMINER, "tests.py": tests},
        arguments=[entry_point],
        limits=limits,
        isolated=isolated,
        channels=(requests_writer, replies_reader, verdict_writer),
        stops_when_done=solution,
    )
    said = bytearray()
    outcome, _ = run_together([examiner, solution], {verdict_reader: said})
    lines = [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith(b"\n")]
    if not lines:
        raise ValueError(f"the tests cannot be run: {outcome.stderr.decode(errors='replace').strip()[-500:]}")
    count, results = lines[0]["tests"], lines[1:]
    if max(count, len(results)) == 0:
        raise ValueError("there are no tests: no top-level assert, no test function or class, no check(candidate)")
    problems = tuple(f"{one['test']}: {one['problem']}" for one in results if one["problem"] is not None)
    return Verdict(len(results) - len(problems), max(count, len(results)), problems)


def compare(
    program: str, cases: Sequence[Case], limits: Limits = DEFAULT_LIMITS, isolated: bool = True, stop_early: bool = True
) -> Verdict:
    """Run a program once for each case and compare what it prints.

    Args:
        stop_early: at the first case that fails; the rest count as failed.

    Raises:
        NotIsolated, SandboxError: as `sandbox.run`.
    """
    passed, problems = 0, []
    for index, case in enumerate(cases):
        outcome = run(program, case.stdin.encode(), limits, isolated)
        printed = outcome.stdout.decode(errors="replace")
        if outcome.succeeded and _lines(printed) == _lines(case.stdout):
            passed += 1
            continue
        how = "printed something else" if outcome.succeeded else f"{outcome.reason} {outcome.exit_code}"
        problems.append(f"case {index}: {how}")
        if stop_early:
            break
    return Verdict(passed, len(cases), tuple(problems))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@lru_cache(maxsize=1)
def _inside() -> dict[str, str]:
    return {f"inside/{path.name}": path.read_text() for path in sorted(Path(__file__).with_name("inside").glob("*.py"))}
