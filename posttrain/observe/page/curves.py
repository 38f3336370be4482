"""Learning curves: loss, reward, KL, entropy and completion length by step."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.observe.page.charts import Series, line_chart
from posttrain.observe.page.markup import Markup, element
from posttrain.observe.page.names import colour_of, domain_of, kind_of
from posttrain.observe.page.parts import absent, section
from posttrain.observe.runview import RunView, StageView


def curves_section(view: RunView, domains: list[str]) -> Markup:
    """Loss, reward, KL, entropy and completion length by step."""
    names = list(view.stages)
    supervised = [name for name in names if kind_of(name) in ("base", "sft")]
    grpo = [name for name in names if kind_of(name) == "grpo"]
    student = ["student"] if "student" in names else []
    charts, missing = [], []
    for title, note, stages, metric, always in (
        ("Supervised loss", "cross-entropy on the answers' tokens, nats", supervised, "loss", True),
        ("Reward in GRPO", "mean over each step's samples", grpo, "reward", True),
        ("KL to the teachers", "the student's loss on its own samples, nats a token", student, "kl", True),
        ("Reward of the student's samples", "not trained on, only watched", student, "reward", False),
        ("KL to the initial policy in GRPO", "nats a token", grpo, "kl", False),
        ("Entropy", "of the policy on its own samples, nats a token", grpo + student, "entropy", True),
        ("Completion length", "tokens, mean over each step's samples", grpo + student, "completion_length", True),
    ):
        if series := series_of(view, stages, metric, domains):
            charts.append(line_chart(title, note, series, zero=True))
        elif always:
            missing.append(title)
    for title, note, metric in (
        ("Reward by effort", "mean over each step's samples in a mode", "reward"),
        ("Completion length by effort", "tokens, reasoning included", "length"),
    ):
        if series := _series_by_effort(view, grpo + student, metric):
            charts.append(line_chart(title, note, series, zero=True))
    return section(
        "curves",
        "Learning curves",
        element(
            "p",
            "Lines are trailing means over a twentieth of the steps, the values themselves lie faintly behind.",
            class_="lead",
        ),
        element("div", charts, class_="grid") if charts else None,
        absent("Nothing was recorded for: " + ", ".join(missing) + ".") if missing else None,
    )


def series_of(view: RunView, stages: Sequence[str], metric: str, domains: Sequence[str]) -> list[Series]:
    """A line for `metric` in every stage that recorded it, and dashed ones where it was kept by domain."""
    series = []
    for name in stages:
        stage = view.stages[name]
        whole = stage_points(stage, metric)
        if whole:
            series.append(Series(domain_of(name) or name, whole, colour_of(name, domains)))
        for domain in domains:
            if part := stage_points(stage, f"{metric}/{domain}"):
                series.append(Series(f"{name}: {domain}", part, colour_of(domain, domains), dashed=bool(whole)))
    return series


def _series_by_effort(view: RunView, stages: Sequence[str], metric: str) -> list[Series]:
    """A line for each mode in every stage that samples in modes; a mode has one colour."""
    return [
        Series(f"{domain_of(name) or name}: {effort}", points, f"c{index}")
        for name in stages
        for index, effort in enumerate(("chat", "high", "max"))
        if (points := stage_points(view.stages[name], f"effort/{effort}/{metric}"))
    ]


def stage_points(stage: StageView, key: str) -> list[tuple[float, float]]:
    """A metric of a stage by step."""
    return sorted((float(step), metrics[key]) for step, _, metrics in stage.history if key in metrics)
