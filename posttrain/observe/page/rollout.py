"""How far the sampler's log-probs are from the trainer's, and how fast sampling was."""

from __future__ import annotations

from typing import Any

from posttrain.observe.metrics import Record
from posttrain.observe.page.charts import Series, line_chart
from posttrain.observe.page.curves import series_of
from posttrain.observe.page.markup import Markup, element, joined
from posttrain.observe.page.names import kind_of
from posttrain.observe.page.parts import absent, breakable, data_table, section
from posttrain.observe.runview import RunView, active_seconds, is_number, record_time
from posttrain.observe.words import duration, number, percent

PARITY_LIMIT = 1e-5
"""Allowed difference of sampled and trained log-probs with our own model in fp32."""


def rollout_section(report: dict[str, Any], view: RunView, domains: list[str]) -> Markup:
    """How far the sampler's log-probs are from the trainer's, and how fast sampling was."""
    recipe_rollout = report["recipe"].get("rollout")
    rollout = recipe_rollout if isinstance(recipe_rollout, dict) else {}
    exact = rollout.get("engine", "native") == "native" and rollout.get("dtype", "float32") == "float32"
    stages = [name for name in view.stages if name != "base" and kind_of(name) != "sft"]
    series = series_of(view, stages, "logprob_diff_max", domains)
    chart = None
    if series:
        limit = PARITY_LIMIT if exact else None
        note = "largest |sampled log-prob − trainer's log-prob| of a token, by step" + (
            "; must stay below the limit" if limit else ""
        )
        chart = line_chart("Rollout against trainer", note, series, log_floor=1e-9, limit=limit, smooth=False)
    rows = [
        [
            element("th", breakable(str(event.get("stage", ""))), scope="row"),
            element("td", number(event.get("tokens"))),
            element("td", duration(event.get("seconds"))),
            element("td", number(_ratio(event.get("tokens"), event.get("seconds")))),
            element("td", number(event.get("max_abs_logprob_diff"))),
            element("td", number(event.get("k3"))),
        ]
        for event in report["rollout"]["stages"]
    ]
    table = None
    if rows:
        columns = ["stage", "tokens", "seconds", "tokens/s", "largest difference", "k3"]
        table = data_table("Rollouts by stage", "k3: the non-negative estimate of KL(sampler ‖ trainer)", columns, rows)
    charts = [chart, *_off_policy_charts(view, stages, domains), *_queue_charts(view)]
    return section(
        "rollout",
        "Rollout against trainer",
        None if series or rows else absent("No rollout was recorded."),
        element("div", charts, _rollout_facts(report["rollout"]), class_="grid") if series or rows else None,
        table,
        _off_policy_table(report["rollout"]["stages"]),
    )


def _off_policy_charts(view: RunView, stages: list[str], domains: list[str]) -> list[Markup]:
    """Of stages that sampled while they learned."""
    ahead = [name for name in stages if series_of(view, [name], "staleness_mean", [])]
    ages = "steps between the weights that sampled and those that learn, mean over tokens"
    ratios = "trainer's probability over the sampler's before bounds, mean over tokens"
    return [
        line_chart(title, note, series, zero=metric == "staleness_mean", smooth=False)
        for title, note, metric in (
            ("Age of the samples", ages, "staleness_mean"),
            ("Importance ratio", ratios, "importance_ratio_raw"),
        )
        if (series := series_of(view, ahead, metric, domains))
    ]


def _queue_charts(view: RunView) -> list[Markup]:
    """What the rollout service had to do over time, and how idle its engines were."""
    events = view.events.get("queues", [])
    if not events or not view.attempts:
        return []

    def series(label: str, key: str, colour: str) -> Series:
        points = [(active_seconds(view.attempts, record_time(event)) / 60, event[key]) for event in events
                  if is_number(event.get(key))]  # fmt: skip
        return Series(label, points, colour)

    queues = [
        series("samples waiting", "waiting", "c0"),
        series("samples running", "running", "c1"),
        series("groups ready", "ready_groups", "c2"),
    ]
    idle = [series("engines idle", "generators_idle", "c3")]
    found = [
        (
            "Queues",
            "unfinished samples (means over time), and finished groups not yet learned from; the largest in the legend",
            queues,
        ),
        ("Idle engines", "share of the time without work, mean over workers; the largest in the legend", idle),
    ]
    return [
        line_chart(title, note, lines, x_label="minutes", zero=True, smooth=False)
        for title, note, lines in found
        if any(one.points for one in lines)
    ]


def _off_policy_table(events: list[Record]) -> Markup | None:
    """Who waited for whom, and how far from on-policy the samples were; a dash where it was not recorded."""
    rows = []
    for event in events:
        found = event.get("off_policy")
        policy: Record = found if isinstance(found, dict) else {}
        if not policy and event.get("generators_idle") is None:
            continue
        cells = [
            percent(event.get("trainer_idle")),
            percent(event.get("generators_idle")),
            number(policy.get("staleness_mean")),
            number(policy.get("staleness_max")),
            percent(policy.get("staleness_masked")),
            number(policy.get("importance_ratio_raw")),
            percent(policy.get("importance_bounded")),
        ]
        name = element("th", breakable(str(event.get("stage", ""))), scope="row")
        rows.append([name, *(element("td", cell) for cell in cells)])
    columns = ["stage", "trainer idle", "generators idle", "mean age", "oldest", "too old", "ratio", "out of bounds"]
    note = "age: steps between the weights that sampled a token and those that learned from it; ratio: mean importance"
    return data_table("Waiting and age", note, columns, rows) if rows else None


def _rollout_facts(rollout: dict[str, Any]) -> Markup:
    facts = [
        ("Speed", f"{number(rollout['tokens_per_second'])} tokens/s"),
        ("Sampled tokens", number(rollout["tokens"])),
        ("Largest log-prob difference", number(rollout["max_abs_logprob_diff"])),
        ("k3, mean over tokens", number(rollout["k3"])),
        ("Weight updates of the engine", number(rollout["weight_syncs"])),
        ("Median time of one", duration(rollout["weight_sync_seconds_median"])),
    ]
    items = [joined(element("dt", name), element("dd", value)) for name, value in facts]
    heading = element("strong", "Over all stages")
    return element("div", heading, element("dl", items, class_="facts"), class_="card")


def _ratio(numerator: Any, denominator: Any) -> float | None:
    return numerator / denominator if is_number(numerator) and is_number(denominator) and denominator > 0 else None
