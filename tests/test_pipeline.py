"""Whole runs, started as a user starts them: Ray, vLLM and TRL at work on a model of 0.6 M parameters."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.recipe import load_recipe
from posttrain.rundir import read_state
from tests.pipeline_kit import Command, contents, posttrain, records, steps_of
from tests.recipe_kit import ROOT

FAST = ROOT / "recipes" / "tiny_v4_fast.yaml"
QWEN = ROOT / "recipes" / "tiny_hf_qwen3.yaml"
MODELS = ["base", *(f"expert/{d}/{kind}" for d in ("arithmetic", "letters") for kind in ("sft", "grpo")), "student"]
HOOKS = (
    "[{holdout: {n: 64}}, {function: 'tests.hook_functions:broken', after: [base]},"
    " {function: 'tests.hook_functions:lengths', after: [base, student]}]"
)
LOGPROB_BOUND = 1e-5
STOP_SECONDS = 15
"""From a signal to the end of the last process, on a machine that does little else."""


@dataclass
class Run:
    path: Path
    command: Command
    seconds: float

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.path / "report.json").read_text())


def model_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [model for model in report["models"] if model["name"] == name]
    return found


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The fast recipe, once from beginning to end."""
    directory = tmp_path_factory.mktemp("fast")
    began = time.monotonic()
    command = posttrain("run", str(FAST), "--name", "fast", "--set", f"evaluation={HOOKS}", directory=directory)
    yield Run(directory / "runs" / "fast", command, time.monotonic() - began)


def test_a_run_takes_every_stage_and_leaves_no_process_behind(fast: Run) -> None:
    assert fast.command.process.returncode == 0, fast.command.output
    assert fast.command.left_over() == []
    state = read_state(fast.path)
    assert state.status == "finished"
    assert list(state.stages) == MODELS
    assert {(stage.status, stage.attempts) for stage in state.stages.values()} == {("done", 1)}
    assert f"Report: {fast.path / 'report.html'}" in fast.command.output
    print(f"the fast recipe took {fast.seconds:.0f} s")


def test_its_experts_are_grown_side_by_side(fast: Run) -> None:
    events = [(record["event"], record.get("stage")) for record in records(fast.path) if "event" in record]
    one, other = (events.index(("stage_started", f"expert/{domain}/sft")) for domain in ("arithmetic", "letters"))
    ended = min(events.index(("stage_finished", f"expert/{domain}/sft")) for domain in ("arithmetic", "letters"))
    assert max(one, other) < ended


def test_its_queues_and_some_of_its_tokens_are_written_down_and_shown(fast: Run) -> None:
    queues = [record for record in records(fast.path) if record.get("event") == "queues"]
    assert queues and all(record["workers"] in (0, 1, 2) for record in queues)
    assert max(record["running"] for record in queues) > 0 < max(record["tokens_per_second"] for record in queues)
    traces = [json.loads(line) for line in (fast.path / "traces.jsonl").read_text().splitlines()]
    assert {trace["stage"] for trace in traces} == {"expert/arithmetic/grpo", "expert/letters/grpo", "student"}
    assert all(trace["sampler"] == pytest.approx(trace["trainer"], abs=LOGPROB_BOUND) for trace in traces)
    assert all(value is None or value >= -1e-6 for trace in traces for value in trace["kl"] or [])
    page = (fast.path / "report.html").read_text()
    assert 'id="tokens"' in page and "Queues" in page


def test_its_hooks_are_run_after_the_models_that_they_name_and_may_fail(fast: Run) -> None:
    found = {(one["model"], one["hook"]): one["metrics"] for one in fast.report["hooks"]}
    assert set(found) == {(model, "tests.hook_functions:lengths") for model in ("base", "student")}
    assert all(one["answers"] == 8 and 0 <= one["characters"] <= 6 for one in found.values())
    (warning,) = [text for text in fast.report["warnings"] if "hook_functions" in text]
    assert "LookupError: no such thing for base" in warning
    assert "tests.hook_functions:lengths" in (fast.path / "report.html").read_text()


def test_its_report_has_everything(fast: Run) -> None:
    report = fast.report
    assert (report["schema"], report["status"], report["seed"]) == (1, "finished", 0)
    assert report["recipe"]["name"] == "tiny-v4-fast"
    assert 20 < report["wall_seconds"] <= fast.seconds
    assert [model["name"] for model in report["models"]] == MODELS
    for model in report["models"]:
        assert Path(model["checkpoint"]).is_dir()
        assert set(model["eval"]) == {"arithmetic", "letters"}
        for cell in model["eval"].values():
            low, high = cell["ci95"]
            assert 0 <= low <= cell["pass@1"] <= high <= 1 and cell["n"] == 64
    rollout = report["rollout"]
    assert 0 <= rollout["max_abs_logprob_diff"] <= LOGPROB_BOUND
    assert 0 <= rollout["k3"] <= 1e-9
    assert 10 < rollout["tokens_per_second"] < 1e6
    assert 0 < rollout["weight_sync_seconds_median"] < 10
    sampled = {stage["stage"]: (stage["tokens"], stage["seconds"]) for stage in rollout["stages"]}
    assert set(sampled) == {"expert/arithmetic/grpo", "expert/letters/grpo", "student"}
    assert all(tokens > 500 and seconds > 0 for tokens, seconds in sampled.values())
    assert 1 << 30 < report["resources"]["peak_rss_bytes"] < 8 << 30
    assert report["error"] is None and report["attempts"] == 1


def test_it_learns(fast: Run) -> None:
    """Little, in two minutes; but the letters' expert and the student beat the base by more than chance."""
    letters = {model["name"]: model["eval"]["letters"] for model in fast.report["models"]}
    for name in ("expert/letters/sft", "expert/letters/grpo", "student"):
        assert letters[name]["ci95"][0] > letters["base"]["ci95"][1], letters


def test_its_page_is_self_contained(fast: Run) -> None:
    page = (fast.path / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#|data:)", page)
    assert not re.search(r"@import|url\(\s*[\"']?(?!data:|#)", page)
    assert "<svg" in page and "expert/letters/grpo" in page


def test_every_checkpoint_loads_with_from_pretrained(fast: Run) -> None:
    for model in fast.report["models"]:
        loaded = DeepseekV4ForCausalLM.from_pretrained(model["checkpoint"])
        assert sum(parameter.numel() for parameter in loaded.parameters()) > 500_000
        assert (Path(model["checkpoint"]) / "tokenizer.json").is_file()


def test_status_and_report_work_on_it(fast: Run) -> None:
    directory = fast.path.parent.parent
    status = posttrain("status", directory=directory)
    assert status.process.returncode == 0
    assert re.search(r"^tiny-v4-fast: finished after ", status.output)
    assert "student\tfinished\t60/60" in status.output
    before = fast.report
    again = posttrain("report", "fast", directory=directory)
    assert again.process.returncode == 0 and again.lines == ["runs/fast/report.json\n", "runs/fast/report.html\n"]
    assert fast.report | {"run_directory": None} == before | {"run_directory": None}


def test_a_second_run_of_the_same_name_is_refused_and_changes_nothing(fast: Run) -> None:
    before = contents(fast.path)
    second = posttrain("run", str(FAST), "--name", "fast", directory=fast.path.parent.parent)
    assert second.process.returncode == 2
    assert "this run exists already" in second.output
    assert contents(fast.path) == before


def test_eval_gives_the_accuracy_of_the_report_and_writes_nothing(fast: Run) -> None:
    before = contents(fast.path)
    student = model_of(fast.report, "student")
    command = posttrain("eval", student["checkpoint"], directory=fast.path.parent.parent)
    assert command.process.returncode == 0, command.output
    for domain, cell in student["eval"].items():
        assert f"{domain}: pass@1 {cell['pass@1']:.1%} " in command.output
    assert contents(fast.path) == before
    assert command.left_over() == []


SHORT = (
    "cluster.dashboard=false",
    "stages.base.steps=10",
    "stages.experts.per_domain[0].steps=40",
    "stages.experts.per_domain[1].steps=2",
    "stages.student.steps=4",
    "evaluation=[{holdout: {n: 16}}]",
)


SFT = ("expert/arithmetic/sft", "expert/letters/sft")


def test_a_run_survives_ctrl_c_and_a_killed_trainer(tmp_path: Path) -> None:
    """Interrupted while two experts run; gone on with, until one of their trainers is killed; gone on with again."""
    run = tmp_path / "runs" / "stopped"
    options = [part for assignment in SHORT for part in ("--set", assignment)]
    first = Command("run", str(FAST), "--name", "stopped", *options, directory=tmp_path)
    first.wait_until(lambda: all(steps_of(run, stage) >= 3 for stage in SFT))
    assert first.listens_on() == {"127.0.0.1"}, "nobody on another machine can reach it"
    pressed = time.monotonic()
    first.press_ctrl_c()
    assert first.wait(120) == 130, first.output
    assert time.monotonic() - pressed < STOP_SECONDS
    assert first.left_over() == []
    assert "Interrupted. Continue with: posttrain resume" in first.output and "Traceback" not in first.output
    state = read_state(run)
    assert state.status == "interrupted"
    assert [state.stages[stage].status for stage in ("base", *SFT)] == ["done", "pending", "pending"]
    assert json.loads((run / "report.json").read_text())["status"] == "interrupted"
    base = contents(run / "checkpoints" / "base")
    written = (run / "checkpoints" / "base" / "model.safetensors").stat().st_mtime_ns
    known = len(records(run))

    second = Command("resume", "stopped", directory=tmp_path)
    second.wait_until(lambda: {r["stage"] for r in records(run)[known:] if "step" in r} >= set(SFT))
    trainers = [process for process in second.left_over() if process.cmdline()[0].startswith("ray::TrainerActor.sft")]
    assert len(trainers) == 2
    trainers[0].send_signal(signal.SIGKILL)
    assert second.wait(120) == 1, second.output
    assert second.left_over() == []
    assert f"error: a trainer died (process {trainers[0].pid})" in second.output
    state = read_state(run)
    assert state.status == "failed"
    statuses = {state.stages[stage].status: stage for stage in SFT}
    assert set(statuses) == {"failed", "done"}, "the other expert's stage was brought to its end"
    assert f"a trainer died (process {trainers[0].pid})" in str(state.stages[statuses["failed"]].error)

    third = posttrain("resume", "stopped", directory=tmp_path)
    assert third.process.returncode == 0, third.output
    assert third.left_over() == []
    state = read_state(run)
    assert state.status == "finished"
    attempts = {name: stage.attempts for name, stage in state.stages.items()}
    assert attempts == dict.fromkeys(MODELS, 1) | {statuses["done"]: 2, statuses["failed"]: 3}
    assert (run / "checkpoints" / "base" / "model.safetensors").stat().st_mtime_ns == written
    assert contents(run / "checkpoints" / "base") == base
    measured = [
        (r["domain"], r["split"]) for r in records(run) if r.get("event") == "evaluated" and r["model"] == "base"
    ]
    assert measured == [("arithmetic", "holdout"), ("letters", "holdout")], "once, and not in every attempt"
    report = json.loads((run / "report.json").read_text())
    assert (report["status"], report["attempts"], len(report["gates"])) == ("finished", 3, 2)


def test_another_family_goes_the_same_way(tmp_path: Path) -> None:
    """A Qwen3 of transformers, served by vLLM's own implementation."""
    shortened = {
        "cluster.dashboard": "false",
        "stages.base.steps": "8",
        "stages.experts.per_domain[0].steps": "8",
        "stages.experts.per_domain[1].steps": "2",
        "stages.student.steps": "4",
        "evaluation": "[{holdout: {n: 32}}]",
    }
    options = [part for key, value in shortened.items() for part in ("--set", f"{key}={value}")]
    command = posttrain("run", str(QWEN), "--name", "qwen", *options, directory=tmp_path)
    assert command.process.returncode == 0, command.output
    assert command.left_over() == []
    report = json.loads((tmp_path / "runs" / "qwen" / "report.json").read_text())
    assert report["status"] == "finished" and [model["name"] for model in report["models"]] == MODELS
    assert report["rollout"]["max_abs_logprob_diff"] < 1e-4  # other kernels than the trainer's, so rounding differs
    checkpoint = Path(model_of(report, "student")["checkpoint"])
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "qwen3"


def test_the_fast_recipe_takes_the_same_way_as_the_default_one() -> None:
    fast, default = load_recipe(FAST), load_recipe(ROOT / "recipes" / "tiny_v4.yaml")
    assert fast.model == default.model and fast.cluster == default.cluster
    assert len(fast.stage_names()) == len(default.stage_names())
    for recipe in (fast, default):
        stages = [recipe.stages.base, *recipe.stages.experts.per_domain, recipe.stages.student]
        assert [(stage.kind, stage.optimizer.name) for stage in stages if stage] == [
            (kind, "muon") for kind in ("sft", "sft", "grpo", "opd")
        ]


def test_no_run_of_these_tests_is_still_there() -> None:
    """The last word: none of this process's descendants has a Ray title."""
    names = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert not [name for name in names if name.startswith("ray::") or "raylet" in name]
