"""Where time and memory went."""

from __future__ import annotations

from typing import Any

from posttrain.observe.page.charts import Series, line_chart
from posttrain.observe.page.markup import Markup, element
from posttrain.observe.page.names import colour_of
from posttrain.observe.page.parts import absent, section
from posttrain.observe.runview import RunView, is_number
from posttrain.observe.words import duration, size


def cost_section(report: dict[str, Any], view: RunView, domains: list[str]) -> Markup:
    """When each stage ran, and what memory the processes took."""
    return section(
        "cost",
        "Time and memory",
        _timeline(report, domains),
        element(
            "div",
            _memory_by_kind(report["resources"]),
            _memory_chart(view),
            _processor_by_kind(report["resources"]),
            class_="grid",
        ),
    )


def _timeline(report: dict[str, Any], domains: list[str]) -> Markup:
    ran = [stage for stage in report["stages"] if stage["seconds"] is not None and stage["start_seconds"] is not None]
    total = max([report["wall_seconds"] or 0.0, *(stage["start_seconds"] + stage["seconds"] for stage in ran)])
    bars = [
        _bar(
            stage["name"],
            stage["start_seconds"] / total,
            stage["seconds"] / total,
            duration(stage["seconds"]),
            colour_of(stage["name"], domains),
        )
        for stage in ran
        if total > 0
    ]
    note = f"from the start of the run to its end, {duration(total)}; bars that overlap ran at the same time"
    return _bars("When the stages ran", note, bars, "No stage was recorded.", wide=True)


def _memory_by_kind(resources: dict[str, Any]) -> Markup:
    kinds = resources["peak_by_process_kind"]
    largest = max(kinds.values(), default=0)
    bars = [_bar(kind, 0, amount / largest, size(amount), "cbase") for kind, amount in kinds.items() if largest > 0]
    return _bars("Peak memory by kind of process", "resident memory at its largest", bars, "Memory was not measured.")


def _processor_by_kind(resources: dict[str, Any]) -> Markup | None:
    kinds = resources.get("cpu_seconds_by_process_kind") or {}
    if not kinds:
        return None
    largest = max(kinds.values())
    bars = [_bar(kind, 0, amount / largest, duration(amount), "cbase") for kind, amount in kinds.items() if amount]
    note = f"{duration(resources['cpu_seconds'])} in all"
    return _bars("Processor time by kind of process", note, bars, "Processor time was not measured.")


def _memory_chart(view: RunView) -> Markup | None:
    events = view.events.get("resources", [])
    if not events:
        return None
    start = view.attempts[0][0]
    series = []
    for label, key, colour in (("summed RSS", "rss_bytes", "c0"), ("summed PSS", "pss_bytes", "c1")):
        series.append(
            Series(label, [((e["time"] - start) / 60, e[key] / 2**30) for e in events if is_number(e.get(key))], colour)
        )
    note = "GiB, all processes of the run; PSS counts shared pages once"
    return (
        line_chart("Memory over time", note, series, x_label="minutes", zero=True, smooth=False)
        if any(one.points for one in series)
        else None
    )


def _bars(title: str, note: str, items: list[Markup], missing: str, wide: bool = False) -> Markup:
    caption = element("figcaption", element("strong", title), element("span", note, class_="note"))
    body = element("ul", items, class_="timeline", role="list") if items else absent(missing)
    return element("figure", caption, body, class_="card wide" if wide else "card", aria_label=title)


def _bar(name: str, start: float, share: float, amount: str, colour: str) -> Markup:
    bar = element("i", style=f"left:{100 * start:.2f}%;width:{100 * share:.2f}%")
    return element(
        "li",
        element("span", name, class_="name"),
        element("span", bar, class_=f"track {colour}", aria_hidden="true"),
        element("span", amount, class_="amount"),
    )
