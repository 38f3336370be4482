"""`posttrain status` and the table at the end of a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from posttrain.observe.progress import live_table
from posttrain.observe.report import load_run
from posttrain.observe.runview import RunView, StageView
from posttrain.observe.words import accuracies, duration, number, percent, size

RECENT_SECONDS = 120
"""A run without an end whose last record is older than this may have been killed."""


def render_status(run_dir: str | Path) -> None:
    """Print how far the run in `run_dir` is: a table on a terminal, tab-separated lines in a pipe.

    Raises BadInput when `run_dir` is not a run directory.
    """
    recipe, view = load_run(run_dir)
    headline = f"{recipe.get('name', Path(run_dir).name)}: {_state(view, time.time())}"
    if sys.stdout.isatty():
        console = Console()
        console.print(Text(headline, style="bold"))
        console.print(live_table(view, time.time(), console.width))
        for warning in view.warnings[-5:]:
            console.print(Text(f"warning: {warning}", style="yellow"))
        return
    print(headline)
    for stage in view.stages.values():
        print(
            "\t".join(
                [stage.name, stage.status, f"{stage.step}/{stage.steps}", duration(stage.seconds()), _last(view, stage)]
            )
        )
    for warning in view.warnings[-5:]:
        print(f"warning\t{warning}")


def _state(view: RunView, now: float) -> str:
    if not view.attempts:
        return "not started"
    if view.finish is not None:
        error = view.finish.get("error")
        return f"{view.finish.get('status', 'finished')} after {duration(view.seconds)}" + (
            f": {error}" if error else ""
        )
    silent = now - view.attempts[-1][1]
    doubt = "; perhaps killed, `posttrain resume` continues it" if silent > RECENT_SECONDS else ""
    return f"running for {duration(view.seconds)}, last record {duration(silent)} ago{doubt}"


def _last(view: RunView, stage: StageView) -> str:
    parts = [f"{key} {number(stage.latest[key])}" for key in ("loss", "reward", "kl") if key in stage.latest]
    accuracy = view.accuracy(stage.name)
    return ", ".join(parts + ([accuracies(accuracy)] if accuracy else []) + ([stage.error] if stage.error else []))


def final_table(report: dict[str, Any]) -> Group:
    """What `posttrain run` prints at its end, for `rich.print`: pass@1 with 95 % intervals, time, memory, place."""
    domains = list(report["summary"]["domains"])
    table = Table(
        title=Text(f"{report['name']}: {report['status']}"), title_justify="left", title_style="bold", pad_edge=False
    )
    table.add_column("model", no_wrap=True)
    for domain in domains:
        table.add_column(Text(domain), justify="right")
    table.add_column("mean", justify="right")
    table.add_column("time", justify="right")
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    for model in report["models"]:
        cells = [_cell(model["eval"].get(domain)) for domain in domains]
        mean = percent(report["summary"]["mean_pass@1"].get(model["name"]))
        style = "bold" if model["name"] == "student" else ""
        table.add_row(Text(model["name"]), *cells, mean, duration(seconds.get(model["name"])), style=style)
    facts = [
        f"wall time {duration(report['wall_seconds'])}",
        f"peak memory {size(report['resources']['peak_rss_bytes'])}",
        f"rollout {number(report['rollout']['tokens_per_second'])} tokens/s",
        f"largest log-prob difference {number(report['rollout']['max_abs_logprob_diff'])}",
    ]
    place = Path(report["run_directory"]) / "report.html"
    last = Text(f"Report: {place}", no_wrap=True, overflow="ignore")
    return Group(table, *_by_effort(report["models"]), Text("; ".join(facts)), last)


def _by_effort(models: list[dict[str, Any]]) -> list[Table]:
    """Accuracy and length in each mode, for every model and every domain that has modes."""
    rows = [
        (model["name"], domain, cell["modes"])
        for model in models
        for domain, cell in model["eval"].items()
        if "modes" in cell
    ]
    if not rows:
        return []
    efforts = list(dict.fromkeys(effort for _, _, modes in rows for effort in modes))
    table = Table(title=Text("by reasoning effort"), title_justify="left", pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("domain", no_wrap=True)
    for effort in efforts:
        table.add_column(Text(effort), justify="right")
        table.add_column("tokens", justify="right")
    for name, domain, modes in rows:
        cells = [text for effort in efforts for text in (_cell(modes.get(effort)), _length(modes.get(effort)))]
        table.add_row(Text(name), Text(domain), *cells)
    return [table]


def _length(accuracy: dict[str, Any] | None) -> str:
    return number(accuracy.get("mean_length")) if accuracy else "–"


def _cell(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return "–"
    if not accuracy["ci95"]:
        return percent(accuracy["pass@1"])
    low, high = accuracy["ci95"]
    return f"{percent(accuracy['pass@1'])} ({100 * low:.1f}–{100 * high:.1f})"
