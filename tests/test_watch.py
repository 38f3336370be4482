"""`posttrain watch`: a run that another process drives."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.observe.progress import live_table
from posttrain.observe.runview import RunView
from posttrain.observe.watch import watch
from posttrain.rundir import RunDirectory, driver_of
from tests.observe_kit import finished_run, recipe, write_run

QUEUES = {
    "event": "queues", "waiting": 12, "running": 48, "ready_groups": 3, "workers": 2, "deaths": 0,
    "tokens_per_second": 1830.0, "generators_idle": 0.125,
}  # fmt: skip


def test_a_finished_run_is_shown_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(write_run(tmp_path / "run", finished_run())) is True
    lines = capsys.readouterr().out.splitlines()
    assert "run finished after 10m 00s" in lines[-1] and len(lines) <= 20
    assert any("student on letters: pass@1" in line for line in lines)


def test_it_follows_a_run_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory.create(tmp_path, "run", recipe()) as run:
        assert driver_of(run.path) == os.getpid()
        run.append_event({"event": "run_finished", "status": "interrupted", "time": time.time() - 1000})

        def drive() -> None:
            run.append_event({"event": "run_started"})
            run.append_event({"event": "stage_started", "stage": "base", "steps": 120})
            time.sleep(0.2)
            run.append_event({"event": "run_finished", "status": "failed", "error": "a reason"})

        driver = threading.Timer(0.2, drive)
        driver.start()
        assert watch(run.path) is True
        driver.join()
    out = capsys.readouterr().out
    assert "run interrupted" in out, "an earlier attempt's end is not this one's"
    assert "base started: 120 steps" in out and "run failed" in out.splitlines()[-1] and "a reason" in out


def test_a_run_that_nobody_drives_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory.create(tmp_path / "runs", "dead", recipe()).close()
    (tmp_path / "runs" / "dead" / "lock").write_text("4194399\n")  # above the largest number of a process
    done = CliRunner().invoke(app, ["watch", "dead"])
    assert done.exit_code == 0 and "nobody is running runs/dead" in done.output
    assert CliRunner().invoke(app, ["watch", "other"]).exit_code == 2


def test_the_table_has_queues_and_who_waits_while_a_stage_runs() -> None:
    records = [record for record in finished_run() if record["time"] < 1_700_000_250]
    view = RunView.of([*records, {"time": 1_700_000_250.0, **QUEUES}], recipe().stage_names())
    out = io.StringIO()
    Console(file=out, width=200).print(live_table(view, 1_700_000_251.0, 200))
    text = " ".join(out.getvalue().split())
    assert "rollouts: 12 waiting, 48 running, 3 groups ready · 2 workers · 1,830 tokens/s" in text
    assert "generators idle 12 % · trainer of expert/arithmetic/grpo waits 60 %" in text
    ended = RunView.of([*finished_run(), {"time": 1_700_000_250.0, **QUEUES}], recipe().stage_names())
    out = io.StringIO()
    Console(file=out, width=200).print(live_table(ended, 1_700_000_900.0, 200))
    assert "waiting" not in out.getvalue()


def test_a_live_view_keeps_only_the_latest_of_frequent_events() -> None:
    view = RunView(keep_steps=5)
    for count in range(100):
        view.add(json.loads(json.dumps({"time": float(count), **QUEUES, "waiting": count})))
    assert [event["waiting"] for event in view.events["queues"]] == [99]
