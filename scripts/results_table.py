"""Accuracy of several runs as Markdown: `python scripts/results_table.py runs/a runs/b runs/c`, a run for each seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def main(directories: list[str]) -> int:
    """Print the tables of the runs in `directories`."""
    reports = [json.loads((Path(directory) / "report.json").read_text()) for directory in directories]
    if not reports:
        print("name the run directories", file=sys.stderr)
        return 2
    if own_domains_only(reports[0]):
        print(stages_table(reports))
    else:
        print(accuracy_table(reports))
    print()
    if not own_domains_only(reports[0]) and any(
        "modes" in cell for model in reports[0]["models"] for cell in model["eval"].values()
    ):
        print(effort_table(reports))
        print()
    print(facts_table(reports))
    return 0


def accuracy_table(reports: list[Report]) -> str:
    """A row for each model, a column for each domain and seed."""
    domains = list(reports[0]["models"][0]["eval"])
    columns = [(domain, report) for domain in domains for report in reports]
    lines = ["| model | " + " | ".join(f"{domain}, seed {report['seed']}" for domain, report in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for name in [model["name"] for model in reports[0]["models"]]:
        cells = [cell(report, name, domain) for domain, report in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def own_domains_only(report: Report) -> bool:
    """Whether experts were measured on their own domain alone (`own_domain` of the recipe's evaluation)."""
    return any(set(model["eval"]) != set(report["models"][0]["eval"]) for model in report["models"])


def stages_table(reports: list[Report]) -> str:
    """A row for each domain, mode and seed, a column for each stage: base, what made the expert, student."""
    domains = list(reports[0]["models"][0]["eval"])
    kinds = list(dict.fromkeys(name.split("/")[2] for name in _names(reports[0]) if name.startswith("expert/")))
    student = ["student"] if "student" in _names(reports[0]) else []
    lines = ["| domain | mode | seed | " + " | ".join(["base", *kinds, *student]) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * (1 + len(kinds) + len(student)))
    for domain in domains:
        models = ["base", *(f"expert/{domain}/{kind}" for kind in kinds), *student]
        for mode in reports[0]["models"][0]["eval"][domain].get("modes", [None]):
            for report in reports:
                cells = [cell(report, name, domain, mode, length=True) for name in models]
                lines.append(f"| {domain} | {mode or ''} | {report['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _names(report: Report) -> list[str]:
    return [model["name"] for model in report["models"]]


def effort_table(reports: list[Report]) -> str:
    """A row for each model, domain and mode, a column for each seed: accuracy, interval, mean tokens."""
    lines = ["| model | domain | mode | " + " | ".join(f"seed {report['seed']}" for report in reports) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(reports))
    for model in reports[0]["models"]:
        for domain, result in model["eval"].items():
            for mode in result.get("modes", {}):
                cells = [cell(report, model["name"], domain, mode, length=True) for report in reports]
                lines.append(f"| {model['name']} | {domain} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(report: Report, name: str, domain: str, mode: str | None = None, length: bool = False) -> str:
    """`87.5 (85.3–89.4)`: pass@1 and its 95 % interval in percent; with `length`, the mean tokens of a completion."""
    found = [model for model in report["models"] if model["name"] == name]
    if not found or domain not in found[0]["eval"]:
        return "–"
    result = found[0]["eval"][domain]
    result = result if mode is None else result["modes"][mode]
    low, high = result["ci95"]
    tokens = f", {result['mean_length']:.1f} tokens" if length else ""
    return f"{100 * result['pass@1']:.1f} ({100 * low:.1f}–{100 * high:.1f}){tokens}"


def facts_table(reports: list[Report]) -> str:
    """What each run took."""
    rows = {
        "wall-clock, minutes": lambda r: f"{r['wall_seconds'] / 60:.1f}",
        "peak resident memory in all, GiB": lambda r: f"{r['resources']['peak_rss_bytes'] / 2**30:.2f}",
        "largest trainer − sampler log-probability": lambda r: f"{r['rollout']['max_abs_logprob_diff']:.1e}",
        "k3": lambda r: f"{r['rollout']['k3']:.0e}",
        "weight update, median seconds": lambda r: f"{r['rollout']['weight_sync_seconds_median']:.3f}",
        "rollout tokens/s": lambda r: f"{r['rollout']['tokens_per_second']:,.0f}",
    }
    lines = [
        "| | " + " | ".join(f"seed {report['seed']}" for report in reports) + " |",
        "| --- |" + " --- |" * len(reports),
    ]
    lines += [f"| {title} | " + " | ".join(show(report) for report in reports) + " |" for title, show in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
