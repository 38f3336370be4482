"""Trackers that a recipe asks for, without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import BadInput
from posttrain.observe.metrics import read_metrics
from posttrain.observe.trackers import check_trackers
from posttrain.observe.tracking import tracked
from posttrain.recipe import Recipe
from tests.observe_kit import finished_run, recipe, write_run
from tests.recipe_kit import ROOT

TRACK = """
import json, sys
from pathlib import Path
from posttrain.observe import tracking
from posttrain.recipe import read_recipe

class Nowhere:
    def set(self, *_, **__): pass
    count = observe = refresh = end = set

run = Path(sys.argv[1])
tracking.Exporter = lambda name: Nowhere()  # there is no Ray in this test
recipe = read_recipe(run / "recipe.yaml")
with tracking.Tracking(run, recipe), (run / "metrics.jsonl").open("a") as file:
    for line in (run / "records").read_text().splitlines():
        file.write(line + "\\n")
"""


def with_trackers(*names: str) -> Recipe:
    return Recipe.model_validate(recipe().model_dump() | {"trackers": list(names)})


def followed(directory: Path, *names: str) -> Path:
    """A whole run with these trackers, in a process of its own without a network."""
    run = write_run(directory / "tiny-v4", [], with_trackers(*names))
    (run / "records").write_text("".join(json.dumps(record) + "\n" for record in finished_run()))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRACKIO", "WANDB"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(directory)}
    command = [sys.executable, "-c", TRACK, str(run)]
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not [record for record in read_metrics(run / "metrics.jsonl") if record.get("event") == "warning"]
    return run


def last_of_student() -> dict[str, float]:
    return next(r["metrics"] for r in reversed(finished_run()) if r.get("stage") == "student" and "metrics" in r)


def test_tensorboard_finds_every_step_and_the_accuracies(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(followed(tmp_path, "tensorboard") / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    kl = events.Scalars("student/kl")
    assert [one.step for one in kl] == list(range(1, 151))
    assert kl[-1].value == pytest.approx(last_of_student()["kl"], rel=1e-5)
    assert events.Scalars("accuracy/student/letters")[0].value > 0.8
    assert "expert/arithmetic/grpo/reward" in events.Tags()["scalars"]


def test_trackio_has_the_run_in_the_run_directory(tmp_path: Path) -> None:
    (database,) = (followed(tmp_path, "trackio") / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
        (name,) = {row[0] for row in connection.execute("SELECT run_name FROM metrics")}
    students = [row for row in rows if "student/kl" in row]
    assert name == "tiny-v4" and [row["student/step"] for row in students] == list(range(1, 151))
    assert students[-1]["student/kl"] == pytest.approx(last_of_student()["kl"])


def test_weights_and_biases_writes_its_files_offline(tmp_path: Path) -> None:
    (file,) = (followed(tmp_path, "wandb") / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 10_000


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(with_trackers("tensorboard", "trackio", "wandb"))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else found(name))
    with pytest.raises(BadInput, match=r"trackers\[1\]: trackio is not installed here; install it"):
        check_trackers(with_trackers("tensorboard", "trackio"))


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.observe import tracking

    class Full:
        closed = 0

        def __init__(self, *_: object) -> None:
            self.taken = 0

        def log(self, *_: object) -> None:
            self.taken += 1
            if self.taken > 2:
                raise OSError("the disk is full")

        def close(self) -> None:
            Full.closed += 1

    class Nowhere:
        def __init__(self, run: str) -> None: ...

        def set(self, *_: object, **__: object) -> None: ...

        count = observe = refresh = end = set

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Full)
    monkeypatch.setattr(tracking, "Exporter", Nowhere)
    run = write_run(tmp_path / "run", [])
    with tracking.Tracking(run, with_trackers("tensorboard")):
        write_run(run, finished_run())
    (warning,) = [record for record in read_metrics(run / "metrics.jsonl") if record.get("event") == "warning"]
    assert "tensorboard failed" in warning["message"] and "the disk is full" in warning["message"]
    assert Full.closed == 0, "one that failed is left alone"


def test_what_a_tracker_is_told() -> None:
    step = {"time": 1.0, "stage": "base", "step": 3, "steps": 9, "metrics": {"loss": 0.5, "kl": None, "text": "x"}}
    assert tracked(step) == ("base", 3, {"loss": 0.5})
    evaluated = {"event": "evaluated", "model": "student", "domain": "letters", "pass@1": 0.5}
    assert tracked(evaluated) == ("accuracy", 0, {"student/letters": 0.5})
    assert tracked({**evaluated, "split": "selection"}) is None and tracked({"event": "warning"}) is None
