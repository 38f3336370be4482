"""What a student's teachers did: by domain how far the student is from them, by teacher what its answers cost."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from rich.text import Text

from posttrain.observe.runview import RunView, StageView
from posttrain.observe.words import number, percent, size

RECENT = 20
"""Steps that means are taken over."""
DISTANCES = ("kl", "top1_agreement", "entropy", "teacher_entropy", "completion_length", "share")
"""Metrics by domain, or with several teachers some of them by `<domain>/<teacher>`."""
WORK = ("seconds_teacher", "seconds_teacher_load", "teacher_busy", "teacher_bytes_loaded", "teacher_bytes_returned")
"""Metrics by teacher, of one step."""

Row = dict[str, Any]


def distances(stage: StageView) -> list[Row]:
    """For each domain, and each teacher of a domain that has several, the means of `DISTANCES` over recent steps."""
    return _rows(stage, DISTANCES, "kl")


def work(stage: StageView) -> list[Row]:
    """For each teacher the means of `WORK` over the steps that it worked in recently, and `total_<metric>` over all."""
    rows = _rows(stage, WORK, "seconds_teacher")
    for row in rows:
        for metric in WORK:
            key = f"{metric}/{row['name']}"
            row[f"total_{metric}"] = sum(metrics.get(key, 0.0) for _, _, metrics in stage.history)
    return rows


def _rows(stage: StageView, metrics: Iterable[str], leading: str) -> list[Row]:
    """A row for each name that `leading` was recorded under; a metric that was not recorded under it is None."""
    recent = [values for _, _, values in stage.history[-RECENT:]]
    names = sorted({key.partition("/")[2] for values in recent for key in values if key.startswith(f"{leading}/")})
    rows = []
    for name in names:
        found = {metric: [one[f"{metric}/{name}"] for one in recent if f"{metric}/{name}" in one] for metric in metrics}
        rows.append({"name": name, **{metric: fmean(values) if values else None for metric, values in found.items()}})
    return rows


def teacher_lines(view: RunView) -> Text | None:
    """Of a running student a line for each domain and each teacher; None when none runs."""
    stage = view.stages.get("student")
    if stage is None or stage.status != "running" or not (rows := distances(stage)):
        return None
    lines = [_distance_line(row) for row in rows] + [_work_line(row) for row in work(stage)]
    return Text("\n".join(lines))


def _distance_line(row: Row) -> str:
    parts = [f"KL {number(row['kl'])}", f"top-1 {percent(row['top1_agreement'], 0)}"]
    if row["entropy"] is not None:
        parts.append(f"entropy {number(row['entropy'])} (teacher {number(row['teacher_entropy'])})")
    if row["share"] is not None:
        parts.append(f"{number(row['completion_length'])} tokens, {percent(row['share'], 0)} of the samples")
    return f"student on {row['name']}: {', '.join(parts)}"


def _work_line(row: Row) -> str:
    busy = f" (busy {percent(row['teacher_busy'], 0)})" if row["teacher_busy"] is not None else ""
    parts = [f"{number(row['seconds_teacher'])} s a step{busy}"]
    if row["seconds_teacher_load"]:
        parts.append(f"loading {number(row['seconds_teacher_load'])} s")
    if row["teacher_bytes_returned"]:
        parts.append(f"{size(row['teacher_bytes_returned'])} of states")
    return f"teacher {row['name']}: {', '.join(parts)}"
