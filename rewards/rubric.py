"""Rubrics: criteria with points, graded by a judge. The judge is the caller's; this is how it is asked and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewards.batches import batched, needs

if TYPE_CHECKING:
    from posttrain.data.problems import Problem


@dataclass(frozen=True)
class JudgeRequest:
    """One answer to be graded."""

    problem: Problem
    text: str
    criteria: tuple[str, ...]


Judge = Callable[[Sequence[JudgeRequest]], Sequence[Sequence[float]]]
"""For each request a grade of 0 (not met) to 1 (met) for each of its criteria, in order."""


def _complaint(problem: Problem, **_: Any) -> str | None:
    """What is wrong with a problem's `rubric`: a list of `{criterion: text, points: number}`."""
    rubric = problem.entry.get("rubric")
    if not isinstance(rubric, list) or not rubric or not all(map(_is_criterion, rubric)):
        return "a problem for the reward `rubric` has a `rubric`: a list of {criterion: text, points: number above 0}"
    return None


def _is_criterion(one: Any) -> bool:
    if not isinstance(one, dict) or set(one) != {"criterion", "points"} or not isinstance(one["criterion"], str):
        return False
    points = one["points"]
    return isinstance(points, (int, float)) and not isinstance(points, bool) and math.isfinite(points) and points > 0


@batched
@needs(_complaint)
def rubric(
    problems: Sequence[Problem],
    texts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    finish_reasons: Sequence[str],
    *,
    judge: Judge,
) -> list[float | Exception]:
    """Share of the rubric's points that the judge gives, 0 to 1: sum(points * grade) / sum(points).

    Args:
        judge: in a recipe its import path, `package.module:function`.
    """
    results: list[float | Exception] = [
        math.nan if (complaint := _complaint(problem)) is None else ValueError(complaint) for problem in problems
    ]
    asked = [index for index, one in enumerate(results) if not isinstance(one, Exception)]
    requests = [
        JudgeRequest(problems[index], texts[index], tuple(one["criterion"] for one in problems[index].entry["rubric"]))
        for index in asked
    ]
    graded = list(judge(requests)) if requests else []
    if len(graded) != len(requests):
        raise ValueError(f"the judge graded {len(graded)} of {len(requests)} answers")
    for index, request, grades in zip(asked, requests, graded, strict=True):
        results[index] = _points(request, list(grades))
    return results


def _points(request: JudgeRequest, grades: list[float]) -> float | Exception:
    if len(grades) != len(request.criteria):
        return ValueError(f"the judge gave {len(grades)} grades for {len(request.criteria)} criteria")
    if not all(0 <= grade <= 1 for grade in grades):
        return ValueError(f"the judge gave grades outside 0 to 1: {grades}")
    points = [one["points"] for one in request.problem.entry["rubric"]]
    return sum(point * grade for point, grade in zip(points, grades, strict=True)) / sum(points)
