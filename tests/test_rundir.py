"""The run directory: never overwritten, driven by one process, readable after any kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import BadInput
from posttrain.observe.metrics import read_metrics
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory, find_run, read_state
from tests.recipe_kit import ROOT, files_below, recipe_with


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(recipe_with({}))


def test_a_new_run_holds_its_recipe_and_a_pending_state_for_every_stage(tmp_path: Path, recipe: Recipe) -> None:
    with RunDirectory.create(tmp_path / "runs", None, recipe) as run:
        assert run.path == (tmp_path / "runs" / "small").resolve()
        assert run.unfinished_stages() == recipe.stage_names()
        assert run.status == "running"
    assert files_below(run.path) == {"recipe.yaml", "state.json", "lock"}
    state = json.loads((run.path / "state.json").read_text())
    assert state["schema"] == 1
    assert list(state["stages"]) == recipe.stage_names()


def test_the_default_name_is_numbered_when_taken_and_a_given_name_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    names = []
    for _ in range(3):
        with RunDirectory.create(tmp_path, None, recipe) as run:
            names.append(run.name)
    assert names == ["small", "small-2", "small-3"]
    before = files_below(tmp_path)
    with pytest.raises(BadInput, match=r"exists already(.|\n)*posttrain resume .*small(.|\n)*--name"):
        RunDirectory.create(tmp_path, "small", recipe)
    assert files_below(tmp_path) == before


def test_a_directory_that_is_no_run_is_not_overwritten_either(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "small").mkdir()
    with pytest.raises(BadInput, match="exists already"):
        RunDirectory.create(tmp_path, "mine", recipe)
    with RunDirectory.create(tmp_path, None, recipe) as run:
        assert run.name == "small-2"
    assert files_below(tmp_path / "small") == set()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "x" * 101, "-n"])
def test_a_name_that_is_no_directory_name_is_refused(name: str, tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(BadInput, match="cannot be a run's name"):
        RunDirectory.create(tmp_path, name, recipe)
    assert files_below(tmp_path) == set()


def test_runs_cannot_be_made_below_a_file(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(BadInput, match="runs"):
        RunDirectory.create(tmp_path / "runs", None, recipe)


def test_threads_that_start_runs_at_once_get_a_directory_each(tmp_path: Path, recipe: Recipe) -> None:
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(lambda _: RunDirectory.create(tmp_path, None, recipe), range(16)))
    assert len({run.path for run in runs}) == 16
    for run in runs:
        run.close()


def test_stages_are_remembered_over_a_reopening(tmp_path: Path, recipe: Recipe) -> None:
    with RunDirectory.create(tmp_path, None, recipe) as run:
        checkpoint = run.checkpoint_path("expert/sums/sft")
        assert checkpoint == run.path / "checkpoints" / "expert--sums--sft"
        checkpoint.mkdir(parents=True)
        run.start_stage("expert/sums/sft")
        run.finish_stage("expert/sums/sft", checkpoint, 12.5, {"loss": 0.5, "bad": float("nan")})
        run.start_stage("expert/sums/grpo")
        run.start_stage("expert/words/sft")
        run.fail_stage("expert/words/sft", "out of memory")
        run.drop_stage("expert/words/grpo", "gate")
        run.set_status("interrupted")
    with RunDirectory.open(run.path) as again:
        done = again.stage("expert/sums/sft")
        assert (done.status, done.seconds, done.attempts) == ("done", 12.5, 1)
        assert done.metrics == {"loss": 0.5, "bad": None}
        assert done.checkpoint == "checkpoints/expert--sums--sft"
        assert again.stage_checkpoint("expert/sums/sft") == checkpoint
        assert again.stage("expert/sums/grpo").status == "pending"
        assert again.stage("expert/sums/grpo").attempts == 1
        assert again.stage("expert/words/sft").error == "out of memory"
        assert again.unfinished_stages() == ["base", "expert/sums/grpo", "expert/words/sft", "student"]
        assert again.recipe == recipe
        assert again.status == "interrupted"


def test_a_run_can_be_moved_with_its_checkpoints(tmp_path: Path, recipe: Recipe) -> None:
    with RunDirectory.create(tmp_path / "here", None, recipe) as run:
        run.checkpoint_path("base").mkdir(parents=True)
        run.start_stage("base")
        run.finish_stage("base", run.checkpoint_path("base"), 1.0, {})
    (tmp_path / "here").rename(tmp_path / "there")
    with RunDirectory.open(tmp_path / "there" / "small") as moved:
        assert moved.stage_checkpoint("base") == (tmp_path / "there" / "small" / "checkpoints" / "base").resolve()


def test_a_run_without_a_base_stage_has_nothing_to_do_for_base(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_with({"stages.base": None}))
    with RunDirectory.create(tmp_path, None, recipe) as run:
        assert run.unfinished_stages()[0] == "expert/sums/sft"
    RunDirectory.open(run.path).close()


def test_a_lost_checkpoint_is_noticed_before_anything_is_trained_on_it(tmp_path: Path, recipe: Recipe) -> None:
    with RunDirectory.create(tmp_path, None, recipe) as run:
        run.start_stage("base")
        run.finish_stage("base", run.checkpoint_path("base"), 1.0, {})
    with pytest.raises(BadInput, match="the checkpoint of the finished stage base is gone"):
        RunDirectory.open(run.path)
    run.checkpoint_path("base").mkdir(parents=True)
    RunDirectory.open(run.path).close()


def test_a_second_driver_is_refused_with_the_first_ones_process(tmp_path: Path, recipe: Recipe) -> None:
    with RunDirectory.create(tmp_path, None, recipe) as run:
        with pytest.raises(BadInput, match=rf"process {os.getpid()} is running it"):
            RunDirectory.open(run.path)
        opening = f"from posttrain.rundir import RunDirectory; RunDirectory.open({str(run.path)!r})"
        other = subprocess.run([sys.executable, "-c", opening], cwd=ROOT, capture_output=True, text=True)
        assert other.returncode != 0 and f"process {os.getpid()} is running it" in other.stderr
    RunDirectory.open(run.path).close()


def _drive_for_ever(path: str, ready: Any) -> None:
    run = RunDirectory.open(path)
    run.start_stage("base")
    ready.set()
    while True:
        run.set_status("running")


def test_a_killed_driver_leaves_a_whole_state_and_no_lock(tmp_path: Path, recipe: Recipe) -> None:
    RunDirectory.create(tmp_path, None, recipe).close()
    path = tmp_path / "small"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    driver = context.Process(target=_drive_for_ever, args=(str(path), ready))
    driver.start()
    assert ready.wait(60) and driver.pid
    for _ in range(50):
        assert read_state(path).stages["base"].status == "running"  # a reader never sees half a file
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    with RunDirectory.open(path) as run:
        assert run.stage("base").attempts == 1
        assert run.stage("base").status == "pending"


def test_a_child_process_that_outlives_the_driver_does_not_hold_the_lock(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDirectory.create(tmp_path, None, recipe)
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        run.close()
        RunDirectory.open(run.path).close()
    finally:
        child.kill()
        child.wait()


def test_threads_may_report_stages_at_the_same_time(tmp_path: Path, recipe: Recipe) -> None:
    with RunDirectory.create(tmp_path, None, recipe) as run:
        start = threading.Barrier(4)

        def work(stage: str) -> None:
            start.wait()
            for _ in range(10):
                run.start_stage(stage)
                run.append_event({"event": "stage_started", "stage": stage, "steps": 1})

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, [name for name in recipe.stage_names() if name.startswith("expert")]))
    state = read_state(run.path)
    assert [state.stages[name].attempts for name in recipe.stage_names()] == [0, 10, 10, 10, 10, 0]
    records = read_metrics(run.path / "metrics.jsonl")
    assert len(records) == 40
    assert all(record["event"] == "stage_started" and time.time() - record["time"] < 60 for record in records)


def test_a_run_that_started_nothing_can_be_discarded_and_no_other(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDirectory.create(tmp_path, None, recipe)
    run.discard()
    assert files_below(tmp_path) == set()
    run = RunDirectory.create(tmp_path, None, recipe)
    run.start_stage("base")
    with pytest.raises(ValueError, match="holds work"):
        run.discard()
    run.close()
    assert (run.path / "state.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 2, "name": "x"}', "another version"),
        ('{"schema": 1, "name": "x", "created": 0, "stages": {"base": {"status": "odd"}}}', "damaged"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused(text: str, words: str, tmp_path: Path, recipe: Recipe) -> None:
    RunDirectory.create(tmp_path, None, recipe).close()
    (tmp_path / "small" / "state.json").write_text(text)
    with pytest.raises(BadInput, match=words):
        RunDirectory.open(tmp_path / "small")


def test_a_changed_recipe_does_not_resume_with_the_old_state(tmp_path: Path, recipe: Recipe) -> None:
    RunDirectory.create(tmp_path, None, recipe).close()
    path = tmp_path / "small" / "recipe.yaml"
    path.write_text(path.read_text().replace("  words:", "  letters:"))
    with pytest.raises(BadInput, match="different stages"):
        RunDirectory.open(tmp_path / "small")


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such run directory"):
        RunDirectory.open(tmp_path / "nothing")
    with pytest.raises(BadInput, match="not a run directory"):
        RunDirectory.open(tmp_path)


def test_runs_are_found_by_path_by_name_and_by_age(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(BadInput, match="there is no run in"):
        find_run(None, tmp_path)
    for name in ("one", "two"):
        RunDirectory.create(tmp_path, name, recipe).close()
        time.sleep(0.02)
    (tmp_path / "one" / "report.json").write_text("{}")
    os.utime(tmp_path / "two", (0, 0))
    assert find_run(None, tmp_path) == tmp_path / "one"
    assert find_run("two", tmp_path) == tmp_path / "two"
    assert find_run(str(tmp_path / "two"), "elsewhere") == tmp_path / "two"
    with pytest.raises(BadInput, match=r"three: no such run; in .* there are two, one"):
        find_run("three", tmp_path)
