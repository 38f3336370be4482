"""Several runs side by side: `posttrain report A B`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from posttrain.errors import BadInput
from posttrain.files import atomic_write
from posttrain.observe.intervals import difference_interval
from posttrain.observe.page.comparison import render_comparison
from posttrain.observe.report import build_report, load_run
from posttrain.observe.words import duration, number, percent, points
from posttrain.recipe.document import dotted

Comparison = dict[str, Any]
ABSENT = "(absent)"
NOT_COMPARED = ("name", "seed")
"""Keys of the recipe that are shown with the runs."""


def compare(run_dirs: Sequence[str | Path]) -> Comparison:
    """What differs between runs, as plain data; differences are from the first run.

    Raises:
        BadInput: a directory that is none of a run, or one that is given twice.
    """
    paths = [Path(path) for path in run_dirs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise BadInput("the same run is given twice; name different runs to compare them")
    reports = [build_report(path) for path in paths]
    names = [path.resolve().name for path in paths]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return {
        "runs": [
            {
                "label": label,
                "directory": str(path),
                **{key: report[key] for key in ("name", "seed", "status", "wall_seconds")},
                "commit": report["environment"].get("commit"),
                "peak_rss_bytes": report["resources"]["peak_rss_bytes"],
                "tokens_per_second": report["rollout"]["tokens_per_second"],
            }
            for label, path, report in zip(labels, paths, reports, strict=True)
        ],
        "accuracy": _accuracy(reports),
        "recipe": differing_keys([report["recipe"] for report in reports]),
        "environment": differing_keys([report["environment"] for report in reports]),
    }


def write_comparison(run_dirs: Sequence[str | Path]) -> tuple[Comparison, Path]:
    """Compare runs and write the page into the last run's directory; the comparison and the page's path."""
    comparison = compare(run_dirs)
    views = [load_run(path)[1] for path in run_dirs]
    others = "-".join(Path(path).resolve().name for path in run_dirs[:-1])
    page = Path(run_dirs[-1]) / f"compared-with-{others}.html"
    atomic_write(page, render_comparison(comparison, views))
    return comparison, page


def _accuracy(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and domain that any of the runs evaluated, and for each mode of it."""
    cells = [_cells(report) for report in reports]
    rows = []
    for key in dict.fromkeys(key for found in cells for key in found):
        own = [found.get(key) for found in cells]
        rows.append(
            {
                "model": key[0],
                "domain": key[1],
                "cells": own,
                "differences": [_difference(own[0], other) for other in own[1:]],
            }
        )
    return rows


def _cells(report: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    found = {}
    for model in report["models"]:
        for domain, cell in model["eval"].items():
            found[model["name"], domain] = cell
            for effort, part in cell.get("modes", {}).items():
                found[model["name"], f"{domain}, {effort}"] = part
    return found


def _difference(first: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if first is None or other is None:
        return None
    value = other["pass@1"] - first["pass@1"]
    if not first["ci95"] or not other["ci95"]:
        return {"value": value, "ci95": None}
    interval = difference_interval(first["pass@1"], first["ci95"], other["pass@1"], other["ci95"])
    return {"value": value, "ci95": list(interval)}


def is_clear(difference: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference leaves 0 out."""
    interval = difference["ci95"]
    return interval is not None and not interval[0] <= 0 <= interval[1]


def differing_keys(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The dotted keys at which nested plain data differs, with the value in each."""
    flat = [dict(_flattened(document, ())) for document in documents]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in NOT_COMPARED]
    rows = [{"key": key, "values": [one.get(key, ABSENT) for one in flat]} for key in keys]
    return [row for row in rows if any(_differ(value, row["values"][0]) for value in row["values"])]


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return False
    return bool(type(one) is not type(other) or one != other)


def _flattened(value: Any, key: tuple[str | int, ...]) -> list[tuple[str, Any]]:
    parts: list[tuple[str | int, Any]] = []
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = list(enumerate(value))
    if not parts:
        return [(dotted(key), value)]
    return [found for name, part in parts for found in _flattened(part, (*key, name))]


def comparison_table(comparison: Comparison) -> Group:
    """For the terminal: accuracies with their differences, then what differs in the recipes."""
    labels = [run["label"] for run in comparison["runs"]]
    table = Table(title=Text(" against ".join(labels)), title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("domain", no_wrap=True)
    for index, label in enumerate(labels):
        table.add_column(Text(label), justify="right")
        if index:
            table.add_column("difference", justify="right", no_wrap=True)
    for row in comparison["accuracy"]:
        texts = [Text(row["model"]), Text(row["domain"])]
        for index, cell in enumerate(row["cells"]):
            texts.append(Text(percent(cell["pass@1"]) if cell else "–"))
            if index:
                texts.append(_in_points(row["differences"][index - 1]))
        table.add_row(*texts)
    facts = [
        f"{run['label']}: {run['status']}, {duration(run['wall_seconds'])}, seed {run['seed']}, "
        f"rollout {number(run['tokens_per_second'])} tokens/s"
        for run in comparison["runs"]
    ]
    keys = [f"{row['key']}: {' → '.join(str(value) for value in row['values'])}" for row in comparison["recipe"]] or [
        "the recipes are the same"
    ]
    return Group(table, *(Text(line) for line in [*facts, "", "recipe:", *(f"  {line}" for line in keys)]))


def _in_points(difference: Mapping[str, Any] | None) -> Text:
    if difference is None:
        return Text("–")
    low, high = difference["ci95"] or (None, None)
    text = f"{points(difference['value'])} ({points(low)} to {points(high)})"
    return Text(text, style="bold" if is_clear(difference) else "dim")
