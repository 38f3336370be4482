"""Programs, judged by running them in the sandbox (docs/sandbox.md)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards import sandbox
from rewards.batches import batched, needs, spread

if TYPE_CHECKING:
    from posttrain.data.problems import Problem

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def program_of(text: str) -> str:
    """The last fenced block of an answer, or all of it if it has none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def _complaint(problem: Problem, **_: Any) -> str | None:
    """What is wrong with `tests`, `entry_point`, `cases` and `prefix` of a problem's row."""
    entry = problem.entry
    if ("tests" in entry) == ("cases" in entry):
        return "a problem for the reward `code` has either `tests` (text) or `cases` (a list of {stdin, stdout})"
    for key in ("tests", "entry_point", "prefix"):
        if not isinstance(entry.get(key, ""), str):
            return f"`{key}` is text, not {type(entry[key]).__name__}"
    if "tests" in entry:
        try:
            compile(entry["tests"], "tests", "exec")
        except (SyntaxError, ValueError) as error:
            return f"`tests` is no Python: {error}"
        return None
    cases = entry["cases"]
    if not isinstance(cases, list) or not cases or not all(map(_is_case, cases)):
        return "`cases` is a list of at least one {stdin: text, stdout: text}"
    return None


def _is_case(case: Any) -> bool:
    return (
        isinstance(case, dict) and set(case) == {"stdin", "stdout"} and all(isinstance(x, str) for x in case.values())
    )


@batched
@needs(_complaint)
def code(
    problems: Sequence[Problem],
    texts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    finish_reasons: Sequence[str],
    *,
    partial: bool = False,
    isolated: bool = True,
    seconds: float = 10.0,
    memory_mib: int = 256,
) -> list[float | Exception]:
    """1 if the program in the answer passes the problem's tests; else 0, or with `partial` the share that it passes.

    The same program for the same problem is run once, however often it is among the answers.

    Args:
        isolated: demand that the system can isolate programs; without, they run with what protections there are.
        seconds: for the tests of one answer, or for one of its cases; half of that as CPU time.
        memory_mib: of all of a program's processes.
    """
    limits = sandbox.Limits(wall_seconds=seconds, cpu_seconds=max(1, round(seconds / 2)), memory_mib=memory_mib)

    places: dict[tuple[str, str], list[int]] = {}
    for index, (problem, text) in enumerate(zip(problems, texts, strict=True)):
        places.setdefault((problem.id, program_of(text)), []).append(index)
    distinct = list(places)

    def judge(problem: Problem, index: int) -> float:
        complaint = _complaint(problem)
        if complaint is not None:
            raise ValueError(complaint)
        program = problem.entry.get("prefix", "") + distinct[index][1]
        if "tests" in problem.entry:
            entry_point = problem.entry.get("entry_point", "")
            verdict = sandbox.examine(program, problem.entry["tests"], entry_point, limits, isolated)
        else:
            cases = [sandbox.Case(**case) for case in problem.entry["cases"]]
            verdict = sandbox.compare(program, cases, limits, isolated, stop_early=not partial)
        return verdict.share if partial or verdict.share == 1 else 0.0

    first = [problems[indices[0]] for indices in places.values()]
    verdicts = spread(first, judge, len(os.sched_getaffinity(0)))
    of_answer = {index: verdict for found, verdict in zip(places.values(), verdicts, strict=True) for index in found}
    return [of_answer[index] for index in range(len(texts))]
