"""A run's metrics as Ray serves them to Prometheus, and the Grafana dashboard over them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray

from posttrain.observe import tracking
from posttrain.observe.exported import EXPORTED, Exporter, prometheus_names
from posttrain.observe.metrics import MetricsLog, read_metrics
from posttrain.observe.tracking import Tracking
from rollouts.monitor import Monitor, Queues
from rollouts.worker import Report
from tests.observe_kit import finished_run, recipe, write_run
from tests.recipe_kit import ROOT

DASHBOARD = ROOT / "dashboards" / "posttrain.json"
Labels = dict[str, str]
Found = dict[str, list[tuple[Labels, float]]]


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


def scraped_until(endpoint: str, complete: Callable[[Found], bool], seconds: float = 90) -> Found:
    """All of the project's samples by name, once they are complete."""
    end = time.monotonic() + seconds
    while True:
        text = urllib.request.urlopen(endpoint, timeout=10).read().decode()
        found: Found = {}
        for name, labels, value in re.findall(r"^(ray_posttrain_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
        if complete(found):
            return found
        assert time.monotonic() < end, f"this is all that came: {found}"
        time.sleep(0.3)


def value_of(samples: list[tuple[Labels, float]], **labels: str) -> float:
    (value,) = [value for found, value in samples if labels.items() <= found.items()]
    return value


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gauges are refreshed as often as the fixture's Ray, which reports every second, forgets them."""
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "REFRESH_SECONDS", 0.2)


def test_a_runs_records_are_served_to_prometheus(endpoint: str, quick: None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "some-run", [])
    records = [record for record in finished_run() if record.get("event") != "run_finished"]
    last = [record for record in records if record.get("stage") == "student" and "metrics" in record][-1]
    student = {"run": "some-run", "stage": "student"}
    with Tracking(run, recipe()):
        with (run / "metrics.jsonl").open("a") as file:
            for record in records:
                if (record.get("event"), record.get("stage")) != ("stage_finished", "student"):
                    file.write(json.dumps(record) + "\n")
        # Stages that are over keep their states alone: Ray forgets what is not refreshed.
        found = scraped_until(
            endpoint,
            lambda found: (
                "ray_posttrain_accuracy" in found
                and {labels["stage"] for labels, _ in found.get("ray_posttrain_loss", [])} == {"student"}
            ),
        )
    assert value_of(found["ray_posttrain_step"], **student) == 150 == value_of(found["ray_posttrain_steps"], **student)
    assert value_of(found["ray_posttrain_kl"], part="", **student) == pytest.approx(last["metrics"]["kl"])
    assert value_of(found["ray_posttrain_kl"], part="letters", **student) == last["metrics"]["kl/letters"]
    assert value_of(found["ray_posttrain_reward"], **student) == pytest.approx(last["metrics"]["reward"])
    assert value_of(found["ray_posttrain_loss"], **student) == pytest.approx(last["metrics"]["loss"])
    assert value_of(found["ray_posttrain_trainer_idle_share"], **student) == pytest.approx(0.6)
    states = {labels["stage"]: value for labels, value in found["ray_posttrain_stage_state"]}
    assert states == dict.fromkeys(recipe().stage_names(), 2) | {"student": 1}
    assert value_of(found["ray_posttrain_tokens_total"], **student) == pytest.approx(240_000)
    assert value_of(found["ray_posttrain_step_seconds_count"], **student) == 150
    assert value_of(found["ray_posttrain_phase_seconds_total"], phase="generate", **student) == pytest.approx(126)
    assert value_of(found["ray_posttrain_accuracy"], model="base", domain="letters", run="some-run") < 0.3
    assert set(found) <= prometheus_names()


def test_an_actor_serves_its_own(endpoint: str, tmp_path: Path) -> None:
    class Service:
        def __init__(self, path: str) -> None:
            self.monitor = Monitor(MetricsLog(Path(path) / "metrics.jsonl"))

        def observe(self, pid: int, tokens: int, waiting: int, deaths: int) -> None:
            report = Report([], {}, 10, tokens, 0.0, 1, None, 0.0)
            queues = Queues(waiting=waiting, running=3, ready_groups=4, workers=1, deaths=deaths)
            self.monitor.observe(queues, {0: (pid, report)})

    service = ray.remote(Service).options(num_cpus=0.1).remote(str(tmp_path / "other-run"))
    for state in ((11, 100, 5, 0), (11, 350, 2, 1), (12, 50, 2, 1)):
        ray.get(service.observe.remote(*state))

    def complete(found: Found) -> bool:
        ray.get(service.observe.remote(12, 50, 2, 1))
        return {"ray_posttrain_rollout_tokens_total", "ray_posttrain_rollout_samples"} <= set(found)

    found = scraped_until(endpoint, complete)
    here = {"run": "other-run"}
    assert value_of(found["ray_posttrain_rollout_samples"], state="waiting", **here) == 2
    assert value_of(found["ray_posttrain_rollout_samples"], state="running", **here) == 3
    assert value_of(found["ray_posttrain_rollout_groups_ready"], **here) == 4
    assert value_of(found["ray_posttrain_rollout_deaths_total"], **here) == 1
    assert value_of(found["ray_posttrain_rollout_tokens_total"], worker="0", **here) == 400, "a new process starts at 0"
    assert value_of(found["ray_posttrain_rollout_idle_share"], worker="0", **here) == 0
    events = read_metrics(tmp_path / "other-run" / "metrics.jsonl")
    assert [(event["waiting"], event["deaths"]) for event in events] == [(5, 0), (2, 1), (2, 1)]


def test_a_resumed_run_counts_nothing_twice(endpoint: str, quick: None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "resumed-run", finished_run())
    with Tracking(run, recipe()):
        found = scraped_until(
            endpoint,
            lambda found: any(labels["run"] == "resumed-run" for labels, _ in found.get("ray_posttrain_accuracy", [])),
        )
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
