"""A run's metrics as Ray serves them to Prometheus, and the Grafana dashboard over them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray

from posttrain.observe.exported import EXPORTED, Exporter, prometheus_names
from posttrain.observe.metrics import MetricsLog, read_metrics
from posttrain.observe.tracking import Tracking
from rollouts.monitor import Monitor, Queues
from rollouts.worker import Report
from tests.observe_kit import finished_run, recipe, write_run
from tests.recipe_kit import ROOT

DASHBOARD = ROOT / "dashboards" / "posttrain.json"
Labels = dict[str, str]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address at which a real Ray serves the metrics of its processes."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_metrics_report_interval_ms", "500")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )  # fmt: skip
    try:
        (node,) = ray.nodes()
        yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    finally:
        ray.shutdown()
        patch.undo()


def scraped(endpoint: str, wanted: str, seconds: float = 60) -> dict[str, list[tuple[Labels, float]]]:
    """All of the project's samples by name, once `wanted` is among them."""
    end = time.monotonic() + seconds
    while True:
        text = urllib.request.urlopen(endpoint, timeout=10).read().decode()
        found: dict[str, list[tuple[Labels, float]]] = {}
        for name, labels, value in re.findall(r"^(ray_posttrain_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
        if wanted in found:
            return found
        assert time.monotonic() < end, f"{wanted} never came; there are {sorted(found)}"
        time.sleep(0.3)


def value_of(samples: list[tuple[Labels, float]], **labels: str) -> float:
    (value,) = [value for found, value in samples if labels.items() <= found.items()]
    return value


def test_a_runs_records_are_served_to_prometheus(endpoint: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "some-run", [])
    records = finished_run()
    with Tracking(run, recipe()), (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    found = scraped(endpoint, "ray_posttrain_accuracy")
    last = [record for record in records if record.get("stage") == "student" and "metrics" in record][-1]
    student = {"run": "some-run", "stage": "student"}
    assert value_of(found["ray_posttrain_step"], **student) == 150 == value_of(found["ray_posttrain_steps"], **student)
    assert value_of(found["ray_posttrain_kl"], part="", **student) == pytest.approx(last["metrics"]["kl"])
    assert value_of(found["ray_posttrain_kl"], part="letters", **student) == last["metrics"]["kl/letters"]
    assert value_of(found["ray_posttrain_reward"], **student) == pytest.approx(last["metrics"]["reward"])
    assert value_of(found["ray_posttrain_loss"], **student) == pytest.approx(last["metrics"]["loss"])
    assert value_of(found["ray_posttrain_trainer_idle_share"], **student) == pytest.approx(0.6)
    assert value_of(found["ray_posttrain_stage_state"], **student) == 2
    assert value_of(found["ray_posttrain_tokens_total"], **student) == pytest.approx(240_000)
    assert value_of(found["ray_posttrain_step_seconds_count"], **student) == 150
    assert value_of(found["ray_posttrain_phase_seconds_total"], phase="generate", **student) == pytest.approx(126)
    assert value_of(found["ray_posttrain_accuracy"], model="base", domain="letters", run="some-run") < 0.3
    assert set(found) <= prometheus_names()


def test_an_actor_serves_its_own(endpoint: str, tmp_path: Path) -> None:
    def observe(path: str) -> None:
        monitor = Monitor(MetricsLog(Path(path) / "metrics.jsonl"))
        first = Report([], {}, 10, 100, 0.0, 1, None, 0.0)
        second = Report([], {}, 20, 350, 0.0, 1, None, 0.0)
        monitor.observe(Queues(waiting=5, running=7, ready_groups=1, workers=1, deaths=0), {0: (11, first)})
        monitor.observe(Queues(waiting=2, running=3, ready_groups=4, workers=1, deaths=1), {0: (11, second)})
        restarted = Report([], {}, 1, 50, 0.0, 1, None, 0.0)
        monitor.observe(Queues(waiting=2, running=3, ready_groups=4, workers=1, deaths=1), {0: (12, restarted)})

    class Service:
        def observe(self, path: str) -> None:
            observe(path)

    service = ray.remote(Service).options(num_cpus=0.1).remote()
    ray.get(service.observe.remote(str(tmp_path / "other-run")))
    found = scraped(endpoint, "ray_posttrain_rollout_tokens_total")
    here = {"run": "other-run"}
    assert value_of(found["ray_posttrain_rollout_samples"], state="waiting", **here) == 2
    assert value_of(found["ray_posttrain_rollout_samples"], state="running", **here) == 3
    assert value_of(found["ray_posttrain_rollout_groups_ready"], **here) == 4
    assert value_of(found["ray_posttrain_rollout_deaths_total"], **here) == 1
    assert value_of(found["ray_posttrain_rollout_tokens_total"], worker="0", **here) == 400, "a new process starts at 0"
    assert value_of(found["ray_posttrain_rollout_idle_share"], worker="0", **here) == 0
    events = read_metrics(tmp_path / "other-run" / "metrics.jsonl")
    assert [(event["waiting"], event["deaths"]) for event in events] == [(5, 0), (2, 1), (2, 1)]


def test_a_resumed_run_counts_nothing_twice(endpoint: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "resumed-run", finished_run())
    with Tracking(run, recipe()):
        pass
    found = scraped(endpoint, "ray_posttrain_accuracy")
    end = time.monotonic() + 30
    while not any(labels["run"] == "resumed-run" for labels, _ in found["ray_posttrain_accuracy"]):
        assert time.monotonic() < end
        found = scraped(endpoint, "ray_posttrain_accuracy")
    assert value_of(found["ray_posttrain_step"], run="resumed-run", stage="student") == 150
    assert not [labels for labels, _ in found.get("ray_posttrain_tokens_total", []) if labels["run"] == "resumed-run"]


def test_an_exporter_refuses_a_metric_of_another_kind() -> None:
    with pytest.raises(AssertionError, match="posttrain_loss is a gauge"):
        Exporter("run").count("posttrain_loss", 1.0)


# --- Grafana


PANEL: dict[str, Any] = {
    "type": "object",
    "required": ["id", "type", "title", "gridPos"],
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "type": {"enum": ["timeseries", "stat", "bargauge", "table", "row", "state-timeline", "heatmap"]},
        "title": {"type": "string", "minLength": 3},
        "description": {"type": "string"},
        "gridPos": {
            "type": "object",
            "required": ["h", "w", "x", "y"],
            "properties": {
                "h": {"type": "integer", "minimum": 1},
                "w": {"type": "integer", "minimum": 1, "maximum": 24},
                "x": {"type": "integer", "minimum": 0, "maximum": 23},
                "y": {"type": "integer", "minimum": 0},
            },
            "additionalProperties": False,
        },
        "targets": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["refId", "expr", "datasource"],
                "properties": {"refId": {"pattern": "^[A-Z]$"}, "expr": {"type": "string"}},
            },
        },
        "fieldConfig": {"type": "object", "required": ["defaults", "overrides"]},
    },
}
MODEL = {
    "type": "object",
    "required": ["uid", "title", "schemaVersion", "panels", "templating", "time"],
    "properties": {
        "id": {"type": "null"},
        "uid": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,40}$"},
        "schemaVersion": {"type": "integer", "minimum": 36},
        "panels": {"type": "array", "items": PANEL, "minItems": 8},
        "time": {"type": "object", "required": ["from", "to"]},
        "refresh": {"type": "string"},
        "templating": {
            "type": "object",
            "required": ["list"],
            "properties": {
                "list": {"type": "array", "items": {"type": "object", "required": ["name", "type", "query"]}}
            },
        },
    },
}
"""What Grafana's dashboard model asks of the parts that ours has."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def queries(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_has_the_shape_that_grafana_loads(dashboard: dict[str, Any]) -> None:
    jsonschema.validate(dashboard, MODEL)
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = {name for _, query in queries(dashboard) for name in re.findall(r"\$\{?(\w+)", query)}
    assert used <= variables | {"__rate_interval"}


def test_every_panel_asks_for_metrics_and_labels_that_the_code_exports(dashboard: dict[str, Any]) -> None:
    asked = set()
    for title, query in queries(dashboard):
        names = re.findall(r"\bray_\w+", query)
        assert names, f"{title} asks for no metric"
        for name in names:
            assert name in prometheus_names(), f"{title} asks for {name}, which nobody exports"
        for name, selector in re.findall(r"\bray_(\w+?)(?:_total|_bucket|_sum|_count)?\{([^}]*)\}", query):
            labels = set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\s*\"", selector))
            assert labels <= {"run", *EXPORTED[name].labels}, f"{title}: {name} has no label {labels}"
            assert "run" in labels, f"{title} mixes runs"
        asked |= {re.sub("^ray_|_total$|_bucket$|_sum$|_count$", "", name) for name in names}
    assert not set(EXPORTED) - asked - {"posttrain_steps", "posttrain_grad_norm", "posttrain_learning_rate"}
