"""Tables of a student's teachers."""

from __future__ import annotations

from typing import Any

from posttrain.observe.page.markup import Markup, element
from posttrain.observe.page.parts import breakable, data_table, section
from posttrain.observe.words import duration, number, percent, size


def teachers_section(report: dict[str, Any]) -> Markup | None:
    """How far the student is from its teachers at its end, and what they cost; None without a student's steps."""
    found = report["teachers"]
    if not found["domains"]:
        return None
    distances = [
        [
            element("th", breakable(row["name"]), scope="row"),
            element("td", number(row["kl"])),
            element("td", percent(row["top1_agreement"])),
            element("td", number(row["entropy"])),
            element("td", number(row["teacher_entropy"])),
            element("td", number(row["completion_length"])),
            element("td", percent(row["share"])),
        ]
        for row in found["domains"]
    ]
    work = [
        [
            element("th", breakable(row["name"]), scope="row"),
            element("td", duration(row["total_seconds_teacher"])),
            element("td", percent(row["teacher_busy"])),
            element("td", duration(row["total_seconds_teacher_load"])),
            element("td", size(row["total_teacher_bytes_loaded"])),
            element("td", size(row["total_teacher_bytes_returned"])),
        ]
        for row in found["work"]
    ]
    return section(
        "teachers",
        "Teachers",
        data_table(
            "How far the student is from its teachers",
            "means over the last 20 steps; divergence and entropies in nats a token",
            ["domain", "divergence", "top-1 agreement", "entropy", "teacher's entropy", "tokens", "share of samples"],
            distances,
        ),
        data_table(
            "What the teachers did",
            "over the whole stage; busy: seconds of computing over those between sending a batch and having learned it",
            ["teacher", "computing", "busy", "loading", "weights loaded", "states returned"],
            work,
        ),
    )
