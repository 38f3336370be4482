"""Rubrics: criteria with points, graded by a judge. The judge is the caller's; this is how it is asked and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


Judge = Callable[[Sequence[JudgeRequest]], Sequence[Sequence[float] | Exception]]
"""For each request a grade of 0 (not met) to 1 (met) for each of its criteria, in order, or why there is none."""


Ask = Callable[[str, int, Sequence[JudgeRequest]], Sequence[Sequence[float] | Exception]]
"""Grades by the model itself: of a judge domain, so many votes, for these requests."""


@dataclass(frozen=True)
class ActorJudge:
    """The model that is trained or evaluated, which judges as one of the recipe's judge domains has taught it.

    Without `ask`, before there is a model, it judges nothing.
    """

    domain: str
    votes: int = 1
    """How often each answer is judged; a grade is the share of votes for it."""
    ask: Ask | None = None

    def __call__(self, requests: Sequence[JudgeRequest]) -> Sequence[Sequence[float] | Exception]:
        if self.ask is None:
            raise RuntimeError("the judge is the model that is trained, and there is none here")
        return self.ask(self.domain, self.votes, requests)


def is_rubric(value: Any) -> bool:
    """Whether `value` is a list of `{criterion: text, points: number}`."""
    return isinstance(value, list) and bool(value) and all(map(_is_criterion, value))


def _complaint(problem: Problem, *, criteria: Sequence[Mapping[str, Any]] | None = None, **_: Any) -> str | None:
    """What is wrong with a problem's `rubric`, or with there being none."""
    if not is_rubric(problem.entry.get("rubric", criteria)):
        return (
            "a problem for the reward `rubric` has a `rubric`: a list of {criterion: text, points: number above 0}; "
            "or the recipe has `criteria` for problems without"
        )
    return None


def _rubric_of(problem: Problem, criteria: Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    return problem.entry.get("rubric", criteria or ())


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
    criteria: Sequence[Mapping[str, Any]] | None = None,
) -> list[float | Exception]:
    """Share of the rubric's points that the judge gives, 0 to 1: sum(points * grade) / sum(points).

    Args:
        judge: in a recipe its import path, `package.module:function`, or `{actor: domain}` for an `ActorJudge`.
        criteria: the rubric of problems that bring none.
    """
    results: list[float | Exception] = [
        math.nan if (complaint := _complaint(problem, criteria=criteria)) is None else ValueError(complaint)
        for problem in problems
    ]
    asked = [index for index, one in enumerate(results) if not isinstance(one, Exception)]
    rubrics = [_rubric_of(problems[index], criteria) for index in asked]
    requests = [
        JudgeRequest(problems[index], texts[index], tuple(one["criterion"] for one in rubric))
        for index, rubric in zip(asked, rubrics, strict=True)
    ]
    graded = list(judge(requests)) if requests else []
    if len(graded) != len(requests):
        raise ValueError(f"the judge graded {len(graded)} of {len(requests)} answers")
    for index, rubric, grades in zip(asked, rubrics, graded, strict=True):
        results[index] = grades if isinstance(grades, Exception) else _points(rubric, list(grades))
    return results


def _points(rubric: Sequence[Mapping[str, Any]], grades: list[float]) -> float | Exception:
    if len(grades) != len(rubric):
        return ValueError(f"the judge gave {len(grades)} grades for {len(rubric)} criteria")
    if not all(0 <= grade <= 1 for grade in grades):
        return ValueError(f"the judge gave grades outside 0 to 1: {grades}")
    points = [one["points"] for one in rubric]
    return sum(point * grade for point, grade in zip(points, grades, strict=True)) / sum(points)
