"""The page of `posttrain report A B`: accuracies with their differences, curves over each other, what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.observe.page.charts import Series, line_chart
from posttrain.observe.page.curves import stage_points
from posttrain.observe.page.markup import Markup, element
from posttrain.observe.page.names import kind_of
from posttrain.observe.page.parts import absent, breakable, data_table, document, section
from posttrain.observe.runview import RunView
from posttrain.observe.words import duration, number, percent, points, size

CURVES = {
    "base": ("loss",),
    "sft": ("loss",),
    "grpo": ("reward", "kl", "entropy", "completion_length"),
    "student": ("kl", "reward", "entropy", "completion_length"),
}
TITLES = {
    "loss": "loss",
    "reward": "reward",
    "kl": "KL, nats a token",
    "entropy": "entropy, nats a token",
    "completion_length": "completion length, tokens",
}


def render_comparison(comparison: Mapping[str, Any], views: Sequence[RunView]) -> str:
    """The page for `comparison` (of `posttrain.observe.compare`), with curves from the runs' views in order."""
    labels = [run["label"] for run in comparison["runs"]]
    title = " against ".join(labels)
    header = element(
        "header",
        element("div", element("h1", title), class_="title"),
        element("p", f"Differences are from {labels[0]}.", class_="lead"),
        element(
            "nav",
            element(
                "ul",
                [
                    element("li", element("a", text, href=f"#{place}"))
                    for place, text in (
                        ("runs", "Runs"),
                        ("accuracy", "Accuracy"),
                        ("curves", "Curves"),
                        ("recipe", "Recipe"),
                    )
                ],
            ),
            aria_label="Sections",
        ),
        class_="top",
    )
    sections = [
        _runs(comparison["runs"]),
        _accuracy(comparison["accuracy"], labels),
        _curves(labels, views),
        _differences(comparison, labels),
    ]
    return document(f"{title}: runs compared", header, sections, "Written by posttrain")


def _runs(runs: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        [
            element("th", run["label"], scope="row"),
            *(
                element("td", text)
                for text in (
                    run["status"],
                    str(run["seed"]),
                    duration(run["wall_seconds"]),
                    size(run["peak_rss_bytes"]),
                    number(run["tokens_per_second"]),
                    (run["commit"] or "–")[:12],
                )
            ),
        ]
        for run in runs
    ]
    columns = ["run", "status", "seed", "wall time", "peak memory", "rollout tokens/s", "commit"]
    return section("runs", "Runs", data_table("The runs", "memory: summed over all processes", columns, rows))


def _accuracy(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Markup:
    if not rows:
        return section("accuracy", "Accuracy", absent("No model has been evaluated in any of the runs."))
    columns = ["model", "domain", labels[0]]
    for label in labels[1:]:
        columns += [label, "difference"]
    body = []
    for row in rows:
        cells = [element("th", breakable(row["model"]), scope="row"), element("td", row["domain"])]
        for index, cell in enumerate(row["cells"]):
            cells.append(element("td", *_cell(cell)))
            if index:
                cells.append(_difference(row["differences"][index - 1]))
        body.append(cells)
    note = (
        "pass@1 on held-out problems; differences in points. An interval without 0 in it is bold. Intervals are for "
        "problems drawn apart: on the same problems they are on the safe side"
    )
    return section("accuracy", "Accuracy", data_table("Accuracy and differences, 95 % intervals", note, columns, body))


def _cell(cell: Mapping[str, Any] | None) -> list[Markup | str]:
    if cell is None:
        return ["–"]
    interval = f"{100 * cell['ci95'][0]:.1f}–{100 * cell['ci95'][1]:.1f}" if cell["ci95"] else "–"
    return [percent(cell["pass@1"]), element("small", interval)]


def _difference(difference: Mapping[str, Any] | None) -> Markup:
    if difference is None:
        return element("td", "–")
    interval = difference["ci95"]
    if not interval:
        return element("td", points(difference["value"]))
    clear = not interval[0] <= 0 <= interval[1]
    value = points(difference["value"])
    between = element("small", f"{points(interval[0])} to {points(interval[1])}")
    tone = ("good" if difference["value"] > 0 else "bad") if clear else None
    return element("td", element("b", value) if clear else value, between, class_=tone)


def _curves(labels: Sequence[str], views: Sequence[RunView]) -> Markup:
    charts = []
    for stage in dict.fromkeys(name for view in views for name in view.stages):
        for metric in CURVES.get(kind_of(stage), ()):
            series = [
                Series(label, found, f"c{index % 8}")
                for index, (label, view) in enumerate(zip(labels, views, strict=True))
                if stage in view.stages and (found := stage_points(view.stages[stage], metric))
            ]
            if series:
                charts.append(line_chart(f"{stage}: {TITLES[metric]}", "by step", series, zero=True))
    lead = element("p", "Trailing means over a twentieth of the steps; the values lie faintly behind.", class_="lead")
    if not charts:
        return section("curves", "Learning curves", absent("No step was recorded in any of the runs."))
    return section("curves", "Learning curves", lead, element("div", charts, class_="grid"))


def _differences(comparison: Mapping[str, Any], labels: Sequence[str]) -> Markup:
    content = []
    for title, note, key in (
        ("Recipes", "keys of the resolved recipes whose values differ", "recipe"),
        ("Environments", "machine, source and packages, where they differ", "environment"),
    ):
        rows = [
            [
                element("th", element("code", row["key"]), scope="row", class_="wraps"),
                *(element("td", str(value), class_="wraps") for value in row["values"]),
            ]
            for row in comparison[key]
        ]
        same = absent(f"{title} are the same.")
        content.append(data_table(title, note, ["key", *labels], rows) if rows else same)
    return section("recipe", "What differs", content)
