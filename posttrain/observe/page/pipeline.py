"""The pipeline drawn: base, a lane of stages for each domain's expert, student."""

from __future__ import annotations

from typing import Any

from posttrain.observe.page.markup import Markup, element, joined
from posttrain.observe.page.names import KINDS, colour_of, domain_of, kind_of
from posttrain.observe.runview import STATUS_MARKS
from posttrain.observe.words import duration, percent
from posttrain.recipe.schema import WARM_START

TONES = {
    "given": "good",
    "finished": "good",
    "failed": "bad",
    "running": "warn",
    "interrupted": "warn",
    "dropped": "warn",
}


def pipeline_section(report: dict[str, Any], domains: list[str]) -> Markup:
    """The section with a box for every stage: accuracy with its interval, steps, seconds."""
    stages = {stage["name"]: stage for stage in report["stages"]}
    cells = {model["name"]: model["eval"] for model in report["models"]}
    lanes = [[name for name in stages if domain_of(name) == domain] for domain in domains]
    lanes = [lane for lane in lanes if lane]

    def box(name: str) -> Markup:
        return _box(stages[name], cells.get(name, {}), domains)

    parts = [element("div", box("base"), class_="end") if "base" in stages else None]
    if lanes:
        rows = [element("div", [box(name) for name in lane], class_="lane") for lane in lanes]
        parts += [_down(), _fan(len(lanes), spreading=True), element("div", rows, class_="lanes")]
    if "student" in stages:
        boxes = [box(name) for name in (WARM_START, "student") if name in stages]
        parts += [_down(), _fan(len(lanes), spreading=False), element("div", boxes, class_="end")]
    return element(
        "section",
        element("h2", "Pipeline"),
        element(
            "p",
            "Accuracy on held-out problems (pass@1) with its 95 % interval; experts in their own domain.",
            class_="lead",
        ),
        element("div", parts, class_="pipeline"),
        id="pipeline",
    )


def _box(stage: dict[str, Any], cells: dict[str, Any], domains: list[str]) -> Markup:
    name, state = stage["name"], stage["status"]
    own = domain_of(name)
    shown = {domain: cell for domain, cell in cells.items() if own in (None, domain)}
    scores = [
        element(
            "p",
            None if own else element("span", domain, class_="domain"),
            element("b", percent(cell["pass@1"])),
            " ",
            element("span", _interval(cell), class_="interval"),
            class_="score",
        )
        for domain, cell in shown.items()
    ]
    if not scores:
        scores = [element("p", "not evaluated", class_="score")]
    effort = [_steps(stage), duration(stage["seconds"]) if stage["seconds"] else None]
    mark = element("span", f"{STATUS_MARKS[state]} {state}", class_=TONES.get(state))
    return element(
        "article",
        element("h3", f"{own} · {kind_of(name)}" if own else name),
        element(
            "span",
            "initial weights" if state == "given" else KINDS.get(kind_of(name), kind_of(name)),
            class_="kind",
        ),
        scores,
        element("p", mark, [joined(" · ", element("span", text)) for text in effort if text], class_="time"),
        class_=f"step {colour_of(name, domains)}" + (" pending" if state == "pending" else ""),
    )


def _steps(stage: dict[str, Any]) -> str | None:
    if not stage["steps"]:
        return None
    return f"{stage['steps']} steps" if stage["status"] == "finished" else f"{stage['step']} of {stage['steps']} steps"


def _interval(cell: dict[str, Any]) -> str:
    return f"{100 * cell['ci95'][0]:.1f}–{100 * cell['ci95'][1]:.1f}" if cell["ci95"] else ""


def _fan(lanes: int, spreading: bool) -> Markup:
    """Lines from one box to all lanes or back, stretched to the height of the lanes."""
    paths = []
    for lane in range(max(1, lanes)):
        y = 100 * (lane + 0.5) / max(1, lanes)
        path = f"M4 50 C24 50 20 {y:.1f} 40 {y:.1f}" if spreading else f"M4 {y:.1f} C24 {y:.1f} 20 50 40 50"
        paths.append(element("path", d=path))
    return element("svg", paths, viewBox="0 0 44 100", preserveAspectRatio="none", class_="fan", aria_hidden="true")


def _down() -> Markup:
    return element("div", "↓", class_="down", aria_hidden="true")
