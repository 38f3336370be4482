"""How long a run takes, from a rehearsal of it."""

from __future__ import annotations

from typing import Any

from posttrain.recipe import Recipe
from posttrain.recipe.schema import WARM_START


def step_seconds(records: list[dict[str, Any]], stage: str) -> float | None:
    """Seconds of a step of a stage: between the first step that was recorded and the last; None for a single one."""
    times = [
        (record["step"], record["time"]) for record in records if record.get("stage") == stage and "step" in record
    ]
    if len(times) < 2:
        return None
    (first, began), (last, ended) = min(times), max(times)
    return (ended - began) / (last - first)


def measuring_seconds(records: list[dict[str, Any]], model: str, recipe: Recipe) -> float:
    """Seconds of measuring a model as often and on as many problems as the recipe says."""
    total = 0.0
    for record in records:
        if record.get("event") == "evaluated" and record["model"] == model:
            domain = recipe.domains[record["domain"]]
            wanted = domain.selection if record["split"] == "selection" else recipe.holdouts[-1].n
            total += record["seconds"] * max(1.0, wanted / record["n"])
    return total


def estimated_seconds(recipe: Recipe, report: dict[str, Any], records: list[dict[str, Any]]) -> float:
    """Wall-clock seconds: what the rehearsal took, and the steps and measurements that it left out.

    Experts run side by side in the recipe's slots, each in the slot that is free first.
    """
    missing = {name: _missing_seconds(recipe, name, records) for name in recipe.stage_names()}
    slots = [0.0] * min(recipe.cluster.trainers, recipe.cluster.rollout_workers)
    for domain in recipe.experts:
        slots.sort()
        slots[0] += sum(missing[f"expert/{domain}/{stage.kind}"] for stage in recipe.expert_stages(domain))
    student = missing.get(WARM_START, 0.0) + missing.get("student", 0.0)
    return report["wall_seconds"] + missing["base"] + max(slots) + student


def _missing_seconds(recipe: Recipe, name: str, records: list[dict[str, Any]]) -> float:
    steps = {record["step"] for record in records if record.get("stage") == name and "step" in record}
    each = step_seconds(records, name) or 0.0
    rehearsed = sum(
        record["seconds"] for record in records if record.get("event") == "evaluated" and record["model"] == name
    )
    return each * (_steps(recipe, name) - len(steps)) + measuring_seconds(records, name, recipe) - rehearsed


def _steps(recipe: Recipe, name: str) -> int:
    by_key = recipe.stages_by_key()
    if name in ("base", "student", WARM_START):
        stage = by_key.get("student.warm_start" if name == WARM_START else name)
        return stage.steps if stage is not None else 0
    _, domain, kind = name.split("/")
    return next(stage.steps for stage in recipe.expert_stages(domain) if stage.kind == kind)
