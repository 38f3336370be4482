"""Evaluations that a run of the tests hangs on its models."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from posttrain.stages.hooks import EvaluatedModel


def lengths(model: EvaluatedModel) -> Mapping[str, float]:
    """Characters of an answer to two questions."""
    answers = model.answers(["1+2=", "30+4="], max_tokens=6, samples=4)
    return {"characters": fmean(len(one) for group in answers for one in group), "answers": sum(map(len, answers))}


def broken(model: EvaluatedModel) -> Mapping[str, float]:
    """Fails."""
    raise LookupError(f"no such thing for {model.name}")
