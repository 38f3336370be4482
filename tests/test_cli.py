"""The command line, in this process with a pipeline of the test's own; twice as a real process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import posttrain
from posttrain.cli import app
from posttrain.errors import BadInput, RunFailed
from posttrain.recipe import Recipe, load_recipe, read_recipe
from posttrain.rundir import RunDirectory, read_state
from tests.recipe_kit import ROOT, files_below, write_recipe

Work = Callable[..., Any]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with the small recipe; Python's search path is as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_recipe(tmp_path / "small.yaml")
    return tmp_path


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts functions of the test in the place of posttrain.pipeline's."""

    def replace(**functions: Work) -> None:
        module = types.SimpleNamespace(**functions)
        monkeypatch.setattr(posttrain, "pipeline", module, raising=False)
        monkeypatch.setitem(sys.modules, "posttrain.pipeline", module)

    return replace


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_run_hands_the_resolved_recipe_and_a_new_directory_to_the_pipeline(pipeline: Callable[..., None]) -> None:
    seen: list[tuple[Recipe, Path]] = []

    def run(recipe: Recipe, run_directory: RunDirectory) -> int:
        seen.append((recipe, run_directory.path))
        assert read_recipe(run_directory.path / "recipe.yaml") == recipe
        return 0

    pipeline(run=run)
    result = command("run", "small.yaml", "--seed", "9", "--set", "stages.base.steps=4", "--set", "model.config=tiny")
    assert result.exit_code == 0, result.output
    recipe, path = seen[0]
    assert recipe.seed == 9 and recipe.stages.base is not None and recipe.stages.base.steps == 4
    assert path == Path("runs/small").resolve()


def test_a_second_run_gets_the_next_name_and_says_so(pipeline: Callable[..., None]) -> None:
    pipeline(run=lambda recipe, run_directory: 0)
    assert command("run", "small.yaml").output == ""
    result = command("run", "small.yaml")
    assert result.exit_code == 0
    assert result.stdout == "runs/small exists; this run is runs/small-2\n"


def test_a_given_name_that_is_taken_is_refused_before_anything_happens(pipeline: Callable[..., None]) -> None:
    pipeline(run=lambda recipe, run_directory: 0)
    assert command("run", "small.yaml", "--name", "mine", "--runs-dir", "elsewhere").exit_code == 0
    before = files_below(Path())
    result = command("run", "small.yaml", "--run", "mine", "--runs-dir", "elsewhere")
    assert result.exit_code == 2
    assert "elsewhere/mine: this run exists already" in result.stderr
    assert "posttrain resume elsewhere/mine" in result.stderr
    assert files_below(Path()) == before


def test_input_that_the_pipeline_refuses_leaves_no_directory(pipeline: Callable[..., None]) -> None:
    def run(recipe: Recipe, run_directory: RunDirectory) -> int:
        raise BadInput("domains.sums.source: line 3 of the file is bad")

    pipeline(run=run)
    result = command("run", "small.yaml")
    assert result.exit_code == 2
    assert result.stderr == "error: domains.sums.source: line 3 of the file is bad\n"
    assert files_below(Path("runs")) == set()


def test_failed_work_exits_1_and_says_how_to_go_on(pipeline: Callable[..., None]) -> None:
    def run(recipe: Recipe, run_directory: RunDirectory) -> int:
        run_directory.start_stage("base")
        raise RunFailed("the actor died")

    pipeline(run=run)
    result = command("run", "small.yaml")
    assert result.exit_code == 1
    assert result.stderr == "error: the actor died\nContinue with: posttrain resume runs/small\n"
    assert Path("runs/small/state.json").exists()


def test_a_defect_exits_1_with_its_traceback_and_says_how_to_go_on(pipeline: Callable[..., None]) -> None:
    def run(recipe: Recipe, run_directory: RunDirectory) -> int:
        raise ZeroDivisionError("oops")

    pipeline(run=run)
    result = command("run", "small.yaml")
    assert result.exit_code == 1
    assert "ZeroDivisionError: oops" in result.stderr
    assert result.stderr.endswith("Continue with: posttrain resume runs/small\n")


def test_an_interrupt_exits_130_and_says_how_to_go_on(pipeline: Callable[..., None]) -> None:
    def run(recipe: Recipe, run_directory: RunDirectory) -> int:
        raise KeyboardInterrupt

    pipeline(run=run)
    result = command("run", "small.yaml")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted. Continue with: posttrain resume runs/small"


def test_sigterm_is_an_interrupt_while_a_run_is_driven_and_only_then(pipeline: Callable[..., None]) -> None:
    def run(recipe: Recipe, run_directory: RunDirectory) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    pipeline(run=run)
    assert command("run", "small.yaml").exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_resume_goes_on_with_the_named_or_the_newest_run(pipeline: Callable[..., None]) -> None:
    resumed: list[tuple[str, list[str]]] = []

    def run(recipe: Recipe, run_directory: RunDirectory) -> int:
        run_directory.start_stage("base")
        run_directory.checkpoint_path("base").mkdir(parents=True)
        run_directory.finish_stage("base", run_directory.checkpoint_path("base"), 1.0, {})
        run_directory.start_stage("expert/sums/sft")
        raise KeyboardInterrupt

    def resume(run_directory: RunDirectory, *changes: object) -> int:
        assert changes == (None, "refuse")
        resumed.append((run_directory.name, run_directory.unfinished_stages()))
        return 0

    pipeline(run=run, resume=resume)
    assert command("run", "small.yaml", "--name", "one").exit_code == 130
    assert command("run", "small.yaml", "--name", "two").exit_code == 130
    assert command("resume", "runs/one").exit_code == 0
    assert command("resume", "two").exit_code == 0
    assert [name for name, _ in resumed] == ["one", "two"]
    assert resumed[0][1][0] == "expert/sums/sft"
    assert read_state("runs/one").stages["expert/sums/sft"].status == "pending"


def test_resume_may_be_given_another_recipe_and_told_what_becomes_of_what_changed(
    pipeline: Callable[..., None],
) -> None:
    given: list[tuple[Recipe | None, str]] = []

    def resume(run_directory: RunDirectory, recipe: Recipe | None, changed: str) -> int:
        given.append((recipe, changed))
        return 0

    pipeline(run=lambda recipe, run_directory: run_directory.set_status("finished") or 0, resume=resume)
    assert command("run", "small.yaml").exit_code == 0
    assert command("resume", "--set", "stages.base.steps=3", "--changed", "rerun").exit_code == 0
    assert command("resume", "small", "--recipe", "small.yaml").exit_code == 0
    (first, rerun), (second, refuse) = given
    assert first is not None and first.stages.base is not None and first.stages.base.steps == 3
    assert (second, rerun, refuse) == (load_recipe("small.yaml"), "rerun", "refuse")
    result = command("resume", "--set", "stages.base.stepz=3")
    assert result.exit_code == 2 and "stages.base.stepz" in result.stderr and len(given) == 2


def test_resume_leaves_a_finished_run_alone(pipeline: Callable[..., None]) -> None:
    pipeline(run=lambda recipe, run_directory: run_directory.set_status("finished") or 0)
    assert command("run", "small.yaml").exit_code == 0
    result = command("resume")
    assert (result.exit_code, result.stdout) == (0, "runs/small is finished; there is nothing left to do\n")


@pytest.mark.parametrize("name", ["resume", "status", "report"])
def test_a_run_that_is_not_there_is_refused(name: str) -> None:
    assert "there is no run in runs/" in command(name).stderr
    result = command(name, "nothing")
    assert result.exit_code == 2
    assert "nothing: no such run" in result.stderr


def test_status_and_report_work_on_a_run_that_has_just_begun(pipeline: Callable[..., None]) -> None:
    pipeline(run=lambda recipe, run_directory: run_directory.start_stage("base") or 0)
    assert command("run", "small.yaml").exit_code == 0
    result = command("status")
    assert result.exit_code == 0
    assert "small" in result.stdout and "expert/sums/grpo" in result.stdout
    result = command("report", "small")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["runs/small/report.json", "runs/small/report.html"]
    assert Path("runs/small/report.html").is_file()


def test_eval_measures_a_checkpoint_on_its_runs_or_a_named_recipe(
    pipeline: Callable[..., None], working_directory: Path
) -> None:
    calls: list[tuple[str, Path, int | None]] = []

    def evaluate_checkpoint(recipe: Recipe, checkpoint: Path, n: int | None) -> dict[str, dict[str, Any]]:
        calls.append((recipe.name, checkpoint, n))
        return {"sums": {"pass@1": 0.5, "ci95": [0.4, 0.6], "n": 16}}

    pipeline(evaluate_checkpoint=evaluate_checkpoint, run=lambda recipe, run_directory: 0)
    assert command("run", "small.yaml").exit_code == 0
    checkpoint = Path("runs/small/checkpoints/base")
    checkpoint.mkdir(parents=True)
    assert "no config.json" in command("eval", str(checkpoint)).stderr
    (checkpoint / "config.json").write_text("{}")
    result = command("eval", str(checkpoint), "--n", "16")
    assert result.stdout == "sums: pass@1 50.0% (95 % interval 40.0% to 60.0%, 16 problems)\n"
    elsewhere = working_directory / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    assert "--recipe" in command("eval", "elsewhere").stderr
    write_recipe(working_directory / "other.yaml", {"name": "other"})
    assert command("eval", "elsewhere", "--recipe", "other.yaml").exit_code == 0
    assert calls == [("small", checkpoint, 16), ("other", Path("elsewhere"), None)]
    result = command("eval", "elsewhere", "--recipe", "other.yaml", "--n", "33")
    assert result.exit_code == 2
    assert "holds out 32 problems (domains.sums.holdout)" in result.stderr


@pytest.mark.parametrize("arguments", [["validate", "small.yaml"], ["run", "small.yaml", "--dry-run"]])
def test_a_dry_run_shows_the_resolved_recipe_and_the_stages_and_makes_nothing(arguments: list[str]) -> None:
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    assert "    train: 20000\n" in result.stdout  # a default, written out
    lines = result.stdout.splitlines()
    for words in (
        "├── base: 10 steps of 64 examples",
        "│   ├── sums: reasoning-gym chain_sum; 100 problems to train, 16 to select, 32 held out; reward exact",
        "│   │   └── expert/sums/sft: 10 steps of 64 examples",
        "│   │       └── expert/sums/grpo: 5 steps of 16 prompts with 8 answers each",
        "│   └── student: reverse_kl, 10 steps of 64 samples of its own",
        "│       ├── teacher: expert/sums/grpo",
        "└── evaluation of every model: 32 held-out problems of each domain, 1 answer each",
    ):
        assert words in lines
    assert "\x1b" not in result.stdout
    assert files_below(Path()) == {"small.yaml"}


def test_the_tree_shows_what_the_recipe_says(working_directory: Path) -> None:
    (working_directory / "own[1].jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    changes = {
        "stages.base": None,
        "domains.words.source": {"jsonl": "own[1].jsonl"},
        "stages.experts.gate": {"min_gain": 0.1, "action": "drop"},
        "stages.student.shares": {"sums": 2},
        "stages.student.weights": {"sums": 0.5},
        "stages.experts.overrides": {"words": [{"kind": "sft", "steps": 1}]},
    }
    write_recipe(working_directory / "other.yaml", changes)
    shown = command("validate", "other.yaml").stdout
    assert "base: the initial weights" in shown
    assert "own[1].jsonl; " in shown
    assert "gate: pass@1 must gain 10 points over base on 16 selection problems, or the domain is dropped" in shown
    assert "teacher: expert/sums/grpo (weight 0.5, share 2)" in shown
    assert "teacher: expert/words/sft" in shown


def test_modules_in_the_working_directory_can_be_named_as_rewards(
    pipeline: Callable[..., None], working_directory: Path
) -> None:
    (working_directory / "my_reward_module.py").write_text("def score(problem, text, *_, **options): return 1.0\n")
    pipeline(run=lambda recipe, run_directory: 0)
    result = command("run", "small.yaml", "--set", "domains.sums.reward=['my_reward_module:score']")
    assert result.exit_code == 0, result.output


def test_usage_errors_exit_2() -> None:
    for arguments in (["nonsense"], ["run"], ["run", "small.yaml", "--what"], ["eval", "x", "--n", "0"]):
        assert command(*arguments).exit_code == 2


def test_as_a_process_validate_loads_nothing_heavy_and_gives_no_traceback(working_directory: Path) -> None:
    validate = [sys.executable, "-X", "importtime", "-m", "posttrain", "validate", "small.yaml"]
    done = subprocess.run(validate, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("small.yaml is valid\n"), done.stderr
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "pydantic" in imported
    assert not imported & {"torch", "transformers", "vllm", "ray", "trl"}, "an answer would take seconds"
    write_recipe(working_directory / "bad.yaml", {"sead": 1})
    done = subprocess.run([sys.executable, "-m", "posttrain", "run", "bad.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: bad.yaml:") and "Traceback" not in done.stderr
    assert files_below(working_directory) == {"small.yaml", "bad.yaml"}


def test_as_a_process_a_run_is_interrupted_by_ctrl_c_and_can_be_resumed(working_directory: Path) -> None:
    script = """
import sys, time, types, posttrain
def run(recipe, run_directory):
    run_directory.start_stage("base")
    print("started", flush=True)
    time.sleep(60)
posttrain.pipeline = types.SimpleNamespace(run=run)
from posttrain.cli import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, "run", "small.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted. Continue with: posttrain resume runs/small" in errors and "Traceback" not in errors
    with RunDirectory.open("runs/small") as run:
        assert run.stage("base").attempts == 1
