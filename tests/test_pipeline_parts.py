"""The parts of a run that need no cluster: experts side by side, stages done before, failing rewards, dying actors."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain import pipeline
from posttrain.actors import describe_death
from posttrain.data import DomainData, Problem
from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.errors import RunFailed
from posttrain.interrupts import ignored, raised_as_keyboard_interrupt
from posttrain.observe.metrics import MetricsLog
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.side_by_side import Stopped, side_by_side
from posttrain.stages.work import Work
from posttrain.trainers.grpo import without_gaps
from tests.recipe_kit import recipe_with

NOTHING = lambda: None  # noqa: E731


def test_as_many_run_at_once_as_there_are_slots_and_no_slot_twice() -> None:
    held: set[int] = set()
    most, guard = 0, threading.Lock()

    def do(name: str, slot: int) -> str:
        nonlocal most
        with guard:
            assert slot not in held
            held.add(slot)
            most = max(most, len(held))
        time.sleep(0.05)
        with guard:
            held.remove(slot)
        return name.upper()

    result = side_by_side(list("abcdefg"), do, 3, threading.Event(), NOTHING)
    assert list(result.items()) == [(name, name.upper()) for name in "abcdefg"]
    assert most == 3


def test_after_an_error_what_runs_is_finished_and_nothing_else_is_begun() -> None:
    ending, begun, finished = threading.Event(), [], []

    def do(name: str, slot: int) -> None:
        begun.append(name)
        if name == "bad":
            raise RunFailed("broken")
        ending.wait(5)
        finished.append(name)
        raise Stopped  # what a next stage would do

    with pytest.raises(RunFailed, match="broken"):
        side_by_side(["good", "bad", "later", "last"], do, 2, ending, NOTHING)
    assert (sorted(begun), finished) == (["bad", "good"], ["good"])


def test_ctrl_c_makes_running_work_return_and_is_raised_afterwards() -> None:
    ending, killed, ended = threading.Event(), threading.Event(), []

    def do(name: str, slot: int) -> None:
        assert killed.wait(20), "nobody interrupted the work"
        ended.append(name)
        raise RunFailed("its actor was killed")

    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        side_by_side(["one", "two", "three"], do, 2, ending, killed.set)
    assert ending.is_set() and sorted(ended) == ["one", "two"]


def test_sigterm_is_ctrl_c_and_neither_disturbs_what_must_be_finished() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), raised_as_keyboard_interrupt():
        with ignored():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_sigint_that_the_shell_has_switched_off_stays_off() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raised_as_keyboard_interrupt():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


class Actors:
    """In the place of the cluster: `slots`, and a note of who was stopped."""

    slots = 1
    stopped = False

    def stop_actors(self) -> None:
        self.stopped = True


def work_of(directory: Path, changes: dict[str, Any] | None = None) -> tuple[Work, RunDirectory]:
    recipe = Recipe.model_validate(recipe_with(changes or {}))
    if (directory / "run").exists():
        run = RunDirectory.open(directory / "run")
    else:
        run = RunDirectory.create(directory, "run", recipe)
    problem = Problem("sums/1", "sums", ({"role": "user", "content": "1+1"},), "2", {})
    domains = {name: DomainData([problem], [problem], [problem]) for name in recipe.domains}
    return Work(recipe, run, domains, build_character_tokenizer(), Actors()), run  # type: ignore[arg-type]


def never(*place: object) -> None:
    raise AssertionError("a finished stage was run again")


@pytest.mark.parametrize("dropped", [False, True])
def test_a_stage_that_is_over_is_not_run_again(tmp_path: Path, dropped: bool) -> None:
    work, run = work_of(tmp_path)
    checkpoint = run.checkpoint_path("expert/sums/sft")
    checkpoint.mkdir(parents=True)
    run.finish_stage("expert/sums/sft", checkpoint, 1.0, {})
    if dropped:
        run.drop_stage("expert/sums/sft", "gate")
    run.close()
    work, run = work_of(tmp_path)
    assert work.stage("expert/sums/sft", 10, never) == checkpoint.resolve()
    run.close()


def test_an_expert_that_its_gate_dropped_stays_dropped_in_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "stages.experts.gate": {"action": "drop", "min_gain": 0.5},
        "stages.experts.per_domain": [{"kind": "sft"}],
    }
    monkeypatch.setattr(pipeline, "evaluate", lambda *_: {})
    work, run = work_of(tmp_path, changes)
    for domain, passed in (("sums", False), ("words", True)):
        checkpoint = run.checkpoint_path(f"expert/{domain}/sft")
        checkpoint.mkdir(parents=True)
        run.finish_stage(f"expert/{domain}/sft", checkpoint, 1.0, {})
        run.append_event({"event": "gate", "stage": f"expert/{domain}/sft", "passed": passed, "action": "drop"})
    run.close()
    for _ in range(2):  # killed between the gate and the note in state.json; then once more
        work, run = work_of(tmp_path, changes)
        experts = pipeline.grow_experts(work, tmp_path)
        assert experts == {"words": run.checkpoint_path("expert/words/sft").resolve()}
        assert run.stage("expert/sums/sft").status == "dropped"
        run.close()
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "gate" for event in events) == 2, "decided once, and not again"


def test_a_stage_that_an_interrupt_stopped_is_pending_and_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, run = work_of(tmp_path)

    def killed(*place: object) -> None:
        work.interrupt()
        raise RunFailed("a trainer died")

    with pytest.raises(Stopped):
        work.stage("base", 10, killed)
    assert work.cluster.stopped  # type: ignore[attr-defined]
    assert (run.stage("base").status, run.stage("base").attempts) == ("pending", 1)
    with pytest.raises(Stopped):
        work.stage("expert/sums/sft", 10, never)
    assert run.stage("expert/sums/sft").attempts == 0
    run.close()


def test_a_stage_that_fails_says_why(tmp_path: Path) -> None:
    work, run = work_of(tmp_path)

    def fail(*place: object) -> None:
        raise KeyError("loss")

    with pytest.raises(KeyError):
        work.stage("base", 10, fail)
    assert (run.stage("base").status, run.stage("base").error) == ("failed", "KeyError: 'loss'")
    run.close()


def picky(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    """A user's reward that cannot take every answer."""
    return float(int(text) == int(problem.answer))


def test_a_reward_that_fails_marks_the_sample_and_is_told_once(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_with({"domains.sums.reward": ["tests.test_pipeline_parts:picky"]}))
    tokenizer = build_character_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    problem = Problem("sums/1", "sums", ({"role": "user", "content": "1+1"},), "2", {})
    log = MetricsLog(tmp_path / "metrics.jsonl")
    rewards = DomainRewards(recipe, str(tmp_path / "tokenizer"), [problem], "expert/sums/grpo", log)
    rewards = pickle.loads(pickle.dumps(rewards))
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in ("2", "x", "", "3")]
    totals, parts = rewards(["sums/1"] * 4, answers, ["stop"] * 4)
    assert (totals[0], totals[3]) == (1.0, 0.0) and math.isnan(totals[1]) and math.isnan(totals[2])
    assert [bool(part) for part in parts] == [True, False, False, True]
    (warning,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (warning["event"], warning["stage"]) == ("warning", "expert/sums/grpo")
    assert "domains.sums.reward failed on the answer 'x' to sums/1" in warning["message"]
    assert "ValueError: invalid literal for int()" in warning["message"]


def test_a_marked_sample_gets_the_mean_of_its_group() -> None:
    nan = math.nan
    assert without_gaps([1, 0, nan, nan, 1, 1, nan, nan], 4) == [1, 0, 0.5, 0.5, 1, 1, 1, 1]
    assert without_gaps([1, 0, nan, nan], 2) == [1, 0, 0.5, 0.5]


def even(problem_ids: Sequence[str], completion_ids: Any, reasons: Any) -> tuple[list[float], list[dict[str, float]]]:
    """The share of even token ids."""
    return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids], [{}] * len(problem_ids)


def test_nothing_is_learned_from_a_marked_sample() -> None:
    """The gradient is that of the same batch with the mean of the other three answers in the place of the mark."""
    from tests.test_trainers_grpo import tiny_model, train

    def marked(*batch: Any) -> tuple[list[float], list[dict[str, float]]]:
        totals, parts = even(*batch)
        return [math.nan if row % 4 == 1 else total for row, total in enumerate(totals)], parts

    def by_hand(*batch: Any) -> tuple[list[float], list[dict[str, float]]]:
        totals, parts = even(*batch)
        for row in range(1, len(totals), 4):
            totals[row] = (totals[row - 1] + totals[row + 1] + totals[row + 2]) / 3
        return totals, parts

    recorder, progress, *_ = train(tiny_model(0), reward=marked)
    reference, expected, *_ = train(tiny_model(0), reward=by_hand)
    assert expected.gradient.abs().max() > 1e-4
    assert (progress.gradient - expected.gradient).abs().max() < 1e-7
    assert recorder.lines[0]["reward_errors"] == 4 and "reward_errors" not in reference.lines[0]


def test_a_reward_that_always_fails_ends_the_stage() -> None:
    from tests.test_trainers_grpo import tiny_model, train

    def broken(problem_ids: Sequence[str], *_: Any) -> tuple[list[float], list[dict[str, float]]]:
        return [math.nan] * len(problem_ids), [{} for _ in problem_ids]

    with pytest.raises(RunFailed, match="the reward failed on all 16 answers of a step"):
        train(tiny_model(0), reward=broken)


def test_the_death_of_an_actor_is_one_line_that_names_its_kind() -> None:
    killed = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: RolloutWorker\n\tactor_id: 10c3\n"
        "\tpid: 10657\nThe actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
        "exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes ..."
    )
    assert describe_death(Exception(killed)) == (
        "a rollout worker died (process 10657): it was killed, by someone or for want of memory, or it crashed"
    )
    broken = (
        "The actor died because of an error raised in its creation task, \x1b[36mray::TrainerActor.__init__()\x1b[39m "
        "(pid=7, ip=1.2.3.4)\n  File x\nposttrain.errors.RunFailed: the installed TRL is another"
    )
    assert describe_death(Exception(broken)) == (
        "a trainer (process 7) could not start: posttrain.errors.RunFailed: the installed TRL is another"
    )
    assert describe_death(Exception("The owner is gone.")) == "an actor died: The owner is gone."
