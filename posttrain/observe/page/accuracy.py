"""How good the models are: intervals by domain, the whole matrix, what was gained, the gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.observe.page.charts import dot_chart
from posttrain.observe.page.markup import Markup, element
from posttrain.observe.page.names import colour_of, domain_of
from posttrain.observe.page.parts import absent, breakable, data_table, section
from posttrain.observe.runview import is_number
from posttrain.observe.words import number, percent, points

FEW_DOMAINS = 3
"""With more domains than this, a domain's panel leaves out the experts of the others; the table has them all."""


def accuracy_section(report: dict[str, Any], domains: list[str]) -> Markup:
    """A chart for each domain, the whole matrix, what was gained, the gates."""
    models = [model for model in report["models"] if model["eval"]]
    if not models:
        return section("accuracy", "Accuracy", absent("No model has been evaluated."))
    evaluated = [domain for domain in domains if any(domain in model["eval"] for model in models)]
    charts = []
    for domain in evaluated:
        rows = [
            (model["name"], _row_colour(model["name"], domain, domains), cell["pass@1"], cell["ci95"])
            for model in models
            if (len(domains) <= FEW_DOMAINS or domain_of(model["name"]) in (None, domain))
            and (cell := model["eval"].get(domain))
        ]
        charts.append(dot_chart(f"pass@1 on {domain}", "held-out problems; the band is the 95 % interval", rows))
    return section(
        "accuracy",
        "Accuracy",
        element("div", charts, class_="grid"),
        _matrix(models, evaluated, report["summary"]["mean_pass@1"]),
        *[_by_effort(models, domain) for domain in evaluated],
        _gains(report["summary"]["domains"]),
        _hooks(report.get("hooks", [])),
        _gates(report["gates"]),
    )


def _hooks(events: list[dict[str, Any]]) -> Markup | None:
    """What the recipe's other evaluations gave, a row for each model and number."""
    rows = [
        [element("th", breakable(event["model"]), scope="row")]
        + [element("td", text) for text in (breakable(event["hook"]), breakable(name), number(value))]
        for event in events
        for name, value in event["metrics"].items()
    ]
    note = "functions of the recipe, tasks of lm-eval, and the model as a judge"
    return data_table("Other evaluations", note, ["model", "evaluation", "metric", "value"], rows) if rows else None


def _row_colour(model: str, domain: str, domains: Sequence[str]) -> str:
    """An expert of another domain is drawn in grey: the panel is about its own."""
    return "cbase" if domain_of(model) not in (None, domain) else colour_of(model, domains)


def _matrix(models: list[dict[str, Any]], domains: list[str], means: dict[str, float]) -> Markup:
    rows = []
    for model in models:
        cells = []
        for domain in domains:
            cell = model["eval"].get(domain)
            interval = f"{100 * cell['ci95'][0]:.1f}–{100 * cell['ci95'][1]:.1f}" if cell and cell["ci95"] else None
            content = [percent(cell["pass@1"]), element("small", interval)] if cell else "–"
            cells.append(element("td", content, class_="own" if domain_of(model["name"]) == domain else None))
        cells.append(element("td", percent(means.get(model["name"]))))
        rows.append([element("th", breakable(model["name"]), scope="row"), *cells])
    counts = {int(cell["n"]) for model in models for cell in model["eval"].values() if is_number(cell["n"])}
    problems = (
        " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "an unknown number of"
    )
    note = f"{problems} held-out problems a cell, 95 % interval below; an expert's own domain is shaded"
    return data_table("Accuracy of every model in every domain", note, ["model", *domains, "mean"], rows)


def _by_effort(models: list[dict[str, Any]], domain: str) -> Markup | None:
    """Accuracy, interval and length of every model in each of the domain's modes."""
    cells = {model["name"]: model["eval"].get(domain, {}).get("modes", {}) for model in models}
    efforts = list(dict.fromkeys(effort for modes in cells.values() for effort in modes))
    if not efforts:
        return None
    rows = [
        [element("th", breakable(name), scope="row"), *(_effort_cell(modes.get(effort)) for effort in efforts)]
        for name, modes in cells.items()
    ]
    note = "pass@1, its 95 % interval, and the mean tokens of a completion, reasoning included"
    return data_table(f"Reasoning efforts on {domain}", note, ["model", *efforts], rows)


def _effort_cell(cell: dict[str, Any] | None) -> Markup:
    if cell is None:
        return element("td", "–")
    interval = f"{100 * cell['ci95'][0]:.1f}–{100 * cell['ci95'][1]:.1f}" if cell["ci95"] else "–"
    tokens = f"{number(cell.get('mean_length'))} tokens"
    return element("td", percent(cell["pass@1"]), element("small", f"{interval} · {tokens}"))


def _gains(by_domain: dict[str, dict[str, float | None]]) -> Markup:
    rows = [
        [
            element("th", domain, scope="row"),
            *(element("td", percent(values[key])) for key in ("base", "expert", "student")),
            element("td", points(values["gain"])),
            element("td", percent(values["retention"])),
        ]
        for domain, values in by_domain.items()
    ]
    note = (
        "gain: the last expert's accuracy minus base's, in points; kept: the student's share of the expert's accuracy"
    )
    return data_table("From base to student", note, ["domain", "base", "expert", "student", "gain", "kept"], rows)


def _gates(gates: list[dict[str, Any]]) -> Markup | None:
    if not gates:
        return None
    rows = [
        [
            element("th", breakable(str(gate.get("stage", gate.get("domain", "")))), scope="row"),
            element("td", percent(gate.get("parent"))),
            element("td", percent(gate.get("value"))),
            element("td", points(gate.get("gain"))),
            element("td", points(gate.get("min_gain"))),
            element(
                "td",
                "passed" if gate.get("passed") else f"not passed ({gate.get('action', 'warn')})",
                class_="good" if gate.get("passed") else "bad",
            ),
        ]
        for gate in gates
    ]
    return data_table(
        "Gates",
        "an expert against its parent, on the selection problems",
        ["stage", "before", "after", "gain", "needed", "verdict"],
        rows,
    )
