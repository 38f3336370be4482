"""Rewards that judge many answers at once: because they run side by side, or because a model judges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from posttrain.data.problems import Problem

Function = TypeVar("Function", bound=Callable[..., object])
Complaint = Callable[..., str | None]


def batched(function: Function) -> Function:
    """Mark a reward that takes lists, one entry for each answer, and returns as many rewards:

        @batched
        def reward(problems, texts, token_ids, finish_reasons, **parameters) -> Sequence[float | Exception]

    An exception in the place of a reward marks that answer only; one that is raised marks them all.
    """
    function.batched = True  # type: ignore[attr-defined]
    return function


def is_batched(function: Callable[..., object]) -> bool:
    """Whether a reward takes lists."""
    return getattr(function, "batched", False) is True


def needs(complaint: Complaint) -> Callable[[Function], Function]:
    """Mark a reward with what problems must have: `complaint(problem, **parameters)` says what is wrong, or None."""

    def mark(function: Function) -> Function:
        function.complaint = complaint  # type: ignore[attr-defined]
        return function

    return mark


def counts_reasoning(function: Function) -> Function:
    """Mark a reward that takes `reasoning_tokens`: how long the reasoning is, in modes that think; else None."""
    function.counts_reasoning = True  # type: ignore[attr-defined]
    return function


def reasoning_options(function: Callable[..., object], reasoning_tokens: int | None) -> dict[str, int | None]:
    """What is told to a reward besides the recipe's options."""
    return {"reasoning_tokens": reasoning_tokens} if getattr(function, "counts_reasoning", False) else {}


def complaint_about(function: Callable[..., object], problem: Problem, parameters: Mapping[str, Any]) -> str | None:
    """What keeps a reward from judging any answer to a problem; None: nothing that can be told before."""
    complaint: Complaint | None = getattr(function, "complaint", None)
    return complaint(problem, **parameters) if complaint is not None else None


def spread(
    problems: Sequence[Problem], judge: Callable[[Problem, int], float], workers: int
) -> list[float | Exception]:
    """`judge(problem, index)` for each problem, in `workers` threads; in place of a reward the exception it raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers, thread_name_prefix="reward") as pool:
        futures = [pool.submit(judge, problem, index) for index, problem in enumerate(problems)]
    results: list[float | Exception] = []
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        results.append(error if error is not None else future.result())
    return results
