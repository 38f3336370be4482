"""report.json and report.html of a run, from what its directory holds; also of a run that failed or still runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from posttrain.errors import BadInput
from posttrain.files import atomic_write
from posttrain.observe.environment import describe_environment
from posttrain.observe.intervals import binomial_interval
from posttrain.observe.metrics import Record, plain_json, read_metrics
from posttrain.observe.page import render_page
from posttrain.observe.runview import RunView, StageView, active_seconds, is_number
from posttrain.observe.teachers import distances, work
from posttrain.recipe import read_recipe

SCHEMA = 1
"""Version of report.json's layout."""

Report = dict[str, Any]


def build_report(run_dir: str | Path) -> Report:
    """The report of the run in `run_dir` as plain data, without writing anything.

    Parts that the run did not reach are None or empty. Raises BadInput when `run_dir` is not a run directory.
    """
    return _report(Path(run_dir), *load_run(run_dir))


def write_report(run_dir: str | Path) -> Path:
    """Write report.json and report.html into `run_dir`, each at once or not at all; the path of report.html."""
    run_dir = Path(run_dir)
    recipe, view = load_run(run_dir)
    report = _report(run_dir, recipe, view)
    atomic_write(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    page = run_dir / "report.html"
    atomic_write(page, render_page(report, view, read_metrics(run_dir / "traces.jsonl")))
    return page


def load_run(run_dir: str | Path) -> tuple[dict[str, Any], RunView]:
    """The resolved recipe as a mapping, and the view of everything recorded. BadInput when it is no run directory."""
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise BadInput(
            f"{run_dir} is not a run directory: it has no recipe.yaml. "
            "Give a directory that `posttrain run` made, such as runs/<name>."
        )
    recipe = read_recipe(run_dir / "recipe.yaml")
    return recipe.model_dump(mode="json"), RunView.of(read_metrics(run_dir / "metrics.jsonl"), recipe.stage_names())


def _report(run_dir: Path, recipe: dict[str, Any], view: RunView) -> Report:
    models = _models(view)
    finish = view.finish or {}
    status = finish.get("status") or _state(run_dir).get("status") or ("unfinished" if view.attempts else "not started")
    report = {
        "schema": SCHEMA,
        "name": recipe.get("name", run_dir.name),
        "run_directory": str(run_dir),
        "status": str(status),
        "error": finish.get("error"),
        "seed": recipe.get("seed"),
        "wall_seconds": view.seconds,
        "attempts": len(view.attempts),
        "models": models,
        "summary": _summary(models, list(recipe["domains"]), recipe["stages"]["experts"]["joint"]),
        "hooks": [_without_time(event) for event in view.events.get("hook", [])],
        "gates": [_without_time(event) for event in view.events.get("gate", [])],
        "rollout": _rollout(view),
        "teachers": _teachers(view.stages.get("student")),
        "resources": _resources(view.events.get("resources", [])),
        "stages": _stages(view),
        "environment": _environment(view.events.get("run_started", [])),
        "warnings": view.warnings,
        "recipe": recipe,
    }
    return plain_json(report)


def _state(run_dir: Path) -> dict[str, Any]:
    """state.json, {} when there is none to be read: the report needs it only for the status of a killed run."""
    try:
        state = json.loads((run_dir / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("status"), str | None) else {}


def _models(view: RunView) -> list[dict[str, Any]]:
    """Every model that exists (its stage has ended well, or it was evaluated), in the order of the stages."""
    evaluated = {model for model, _ in view.evaluations}
    names = list(dict.fromkeys([*view.stages, *sorted(evaluated)]))
    models = []
    for name in names:
        stage = view.stages.get(name)
        events = {domain: event for (model, domain), event in view.evaluations.items() if model == name}
        if not events and (stage is None or stage.status != "finished"):
            continue
        checkpoints = [event["checkpoint"] for event in events.values() if event.get("checkpoint")]
        checkpoint = stage.checkpoint if stage and stage.checkpoint else next(iter(checkpoints), None)
        models.append(
            {"name": name, "checkpoint": checkpoint, "eval": {domain: _accuracy(e) for domain, e in events.items()}}
        )
    return models


def _accuracy(event: Record) -> dict[str, Any]:
    """One cell of the accuracy matrix; the interval is computed when the event came without."""
    share, n, interval = event["pass@1"], event.get("n"), event.get("ci95")
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))):
        interval = list(binomial_interval(share * n, n)) if is_number(n) and n > 0 and 0 <= share <= 1 else None
    optional = {key: event[key] for key in ("samples", "mean_length", "truncated") if is_number(event.get(key))}
    modes = event.get("modes")
    known = {
        effort: _accuracy(one)
        for effort, one in (modes.items() if isinstance(modes, dict) else ())
        if isinstance(one, dict) and is_number(one.get("pass@1"))
    }
    return {"pass@1": share, "ci95": interval, "n": n, **optional, **({"modes": known} if known else {})}


def _summary(models: list[dict[str, Any]], domains: list[str], joint: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the run gained: means over the domains, and base, expert and student side by side in each domain.

    The expert of a domain in `joint` is the one that learns it beside its own.
    `retention` is the student's accuracy over the expert's, `gain` the expert's minus base's.
    """
    share = {(model["name"], domain): cell["pass@1"] for model in models for domain, cell in model["eval"].items()}
    owner = {domain: name for name, others in joint.items() for domain in others}
    expert = {
        d: model["name"] for d in domains for model in models if model["name"].startswith(f"expert/{owner.get(d, d)}/")
    }
    by_domain = {}
    for domain in domains:
        base, student = share.get(("base", domain)), share.get(("student", domain))
        best = share.get((expert.get(domain, ""), domain))
        by_domain[domain] = {
            "base": base,
            "expert": best,
            "student": student,
            "gain": None if best is None or base is None else best - base,
            "retention": None if student is None or not best else student / best,
        }
    means = {}
    for model in models:
        shares = [share[model["name"], domain] for domain in domains if (model["name"], domain) in share]
        if shares and len(shares) == len(domains):
            means[model["name"]] = fmean(shares)
    return {"mean_pass@1": means, "domains": by_domain}


def _rollout(view: RunView) -> dict[str, Any]:
    """Rollout facts over all stages: the largest log-prob difference, k3 as the mean over tokens."""
    stats = [
        {**_sampled(view.stages.get(str(event.get("stage")))), **event}
        for event in view.events.get("rollout_stats", [])
    ]
    timed = [event for event in stats if is_number(event.get("tokens")) and is_number(event.get("seconds"))]
    tokens, seconds = sum(_numbers(timed, "tokens")), sum(_numbers(timed, "seconds"))
    known = [
        (event["k3"], event["tokens"] if is_number(event.get("tokens")) else 1)
        for event in stats
        if is_number(event.get("k3"))
    ]
    syncs = [second for event in stats for second in event.get("weight_sync_seconds") or [] if is_number(second)]
    syncs = syncs or _numbers(view.events.get("weights_published", []), "seconds")
    return {
        "tokens": tokens if timed else None,
        "tokens_per_second": tokens / seconds if seconds > 0 else None,
        "max_abs_logprob_diff": max(_numbers(stats, "max_abs_logprob_diff"), default=None),
        "k3": sum(k3 * weight for k3, weight in known) / sum(weight for _, weight in known) if known else None,
        "weight_sync_seconds_median": median(syncs) if syncs else None,
        "weight_syncs": len(syncs),
        "stages": [_without_time(event) for event in stats],
    }


def _sampled(stage: StageView | None) -> dict[str, float]:
    """Sampled tokens and seconds of sampling, from a stage's steps: GRPO and OPD train on all that they sample."""
    keys = ("tokens_per_second", "seconds_step", "seconds_generate")
    steps = [metrics for _, _, metrics in stage.history if all(key in metrics for key in keys)] if stage else []
    if not steps:
        return {}
    tokens = sum(metrics["tokens_per_second"] * metrics["seconds_step"] for metrics in steps)
    return {"tokens": round(tokens), "seconds": sum(metrics["seconds_generate"] for metrics in steps)}


def _teachers(student: StageView | None) -> dict[str, Any]:
    """How far the student is from its teachers (means over its last steps), and what each teacher did."""
    return {"domains": distances(student), "work": work(student)} if student else {"domains": [], "work": []}


def _resources(events: list[Record]) -> dict[str, Any]:
    """Peaks over all attempts. Bytes; processor seconds are summed over the attempts' last readings."""
    kinds: dict[str, float] = {}
    busy: dict[str, list[float]] = {}
    for event in events:
        for kind, size in (event.get("peak_by_process_kind") or {}).items():
            kinds[kind] = max(size or 0, kinds.get(kind, 0))
        for kind, seconds in (event.get("cpu_seconds_by_process_kind") or {}).items():
            busy.setdefault(kind, []).append(seconds)
    cpu = {kind: _over_attempts(readings) for kind, readings in busy.items()}
    return {
        "peak_rss_bytes": max(_numbers(events, "peak_rss_bytes"), default=None),
        "peak_pss_bytes": max(_numbers(events, "peak_pss_bytes"), default=None),
        "peak_by_process_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "cpu_seconds": _over_attempts(_numbers(events, "cpu_seconds")) or None,
        "cpu_seconds_by_process_kind": dict(sorted(cpu.items(), key=lambda item: -item[1])),
    }


def _over_attempts(readings: list[float]) -> float:
    """The sum of a total's last readings; one that is smaller than the one before is of a new attempt."""
    total, previous = 0.0, 0.0
    for reading in readings:
        total += reading - previous if reading >= previous else reading
        previous = reading
    return total


def _stages(view: RunView) -> list[dict[str, Any]]:
    """The stages in order. `start_seconds` counts from the run's start, without the pauses between attempts."""
    return [
        {
            "name": stage.name,
            "status": stage.status,
            "start_seconds": None if stage.started is None else active_seconds(view.attempts, stage.started),
            "seconds": stage.seconds(),
            "step": stage.step,
            "steps": stage.steps,
            "checkpoint": stage.checkpoint,
            "error": stage.error,
            "metrics": stage.latest,
        }
        for stage in view.stages.values()
    ]


def _environment(starts: list[Record]) -> dict[str, Any]:
    recorded = starts[-1].get("environment") if starts else None
    if isinstance(recorded, dict):
        return recorded
    return {**describe_environment(), "note": "as found when the report was written; the run did not record its own"}


def _numbers(events: list[Record], key: str) -> list[float]:
    return [event[key] for event in events if is_number(event.get(key))]


def _without_time(event: Record) -> Record:
    return {key: value for key, value in event.items() if key not in ("time", "event")}
