"""The watchdog: what it says of an actor that hangs, when, and what it does then."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import RunFailed
from posttrain.observe.metrics import MetricsLog, read_metrics
from posttrain.observe.progress import PlainLines
from posttrain.observe.pulse import Pulse, read_beats
from posttrain.observe.runview import RunView
from posttrain.recipe.resilience import WatchdogConfig
from posttrain.watchdog import REPLACEMENTS, Stuck, Watchdog, going_on
from rollouts.service import ServiceStats
from tests.recipe_kit import ROOT

STATS = ServiceStats("1", 1, {0: 2}, [0], 3, 4, 5, 0, 0, 0, 100, [])
ACTOR = """
import sys, time
from pathlib import Path
from posttrain.observe.pulse import Pulse
def hangs_in_here():
    print("there", flush=True)
    time.sleep(1000)
pulse = Pulse(Path(sys.argv[1]), sys.argv[2])
with pulse.phase("learning"):
    hangs_in_here()
"""


@dataclass
class Actors:
    """A cluster of stand-ins; the pulses are real."""

    pulses: Path
    stats: ServiceStats | None = STATS
    done: list[str] = field(default_factory=list)

    @property
    def pool(self) -> Actors:
        return self

    def health(self, seconds: float) -> ServiceStats | None:
        return self.stats

    def replace_service(self) -> None:
        self.done.append("service")

    def replace_teacher(self, index: int) -> None:
        self.done.append(f"teacher {index}")


@dataclass
class Run:
    """Where messages go."""

    path: Path

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    def append_event(self, event: dict[str, Any]) -> None:
        fields = dict(event)
        MetricsLog(self.path / "metrics.jsonl").event(fields.pop("event"), **fields)

    @property
    def said(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / "metrics.jsonl")


class Watched:
    """A watchdog whose time is told."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.now = 0.0
        self.actors, self.run = Actors(directory / "pulses"), Run(directory)
        monkeypatch.setattr("posttrain.watchdog.time.monotonic", lambda: self.now)
        stop = lambda: self.actors.done.append("stop")  # noqa: E731
        self.dog = Watchdog(WatchdogConfig(**config), self.actors, self.run, stop)  # type: ignore[arg-type]
        monkeypatch.setattr("posttrain.watchdog.stacks_of", lambda directory, beat: f"stacks of {beat.actor}")

    def after(self, seconds: float) -> list[str]:
        """The actors that are told of by a look so much later."""
        before = len(self.run.said)
        self.now += seconds
        self.dog.look()
        return [one["actor"] for one in self.run.said[before:]]

    def samples(self) -> None:
        """A token comes."""
        assert self.actors.stats is not None
        self.actors.stats = replace(self.actors.stats, tokens=self.actors.stats.tokens + 1)


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ACTOR, str(tmp_path / "pulses"), "trainer 0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    yield process
    process.kill()
    process.wait()


def test_one_message_has_actor_phase_queues_and_stacks(hung: subprocess.Popen[str], tmp_path: Path) -> None:
    run = Run(tmp_path)
    dog = Watchdog(WatchdogConfig(phases={"learning": 0.2}), Actors(tmp_path / "pulses"), run, pytest.fail)  # type: ignore[arg-type]
    with dog.watching():
        end = time.monotonic() + 30
        while not run.said and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.5)
    (record,) = run.said
    assert (record["actor"], record["phase"], record["action"]) == ("trainer 0", "learning", "wait")
    assert f"trainer 0 (process {hung.pid}) made no progress" in record["message"]
    assert record["queues"] == "3 samples waiting, 4 in engines, 5 groups ready"
    assert "hangs_in_here" in record["stacks"]
    line, *stacks = PlainLines(RunView(["base"]), 10).of(record)
    assert "STUCK: trainer 0" in line and line.endswith("action: wait")
    assert any("hangs_in_here" in text for text in stacks)


def test_a_stopped_process_has_no_stacks_and_that_is_said(
    hung: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.observe.pulse import stacks_of

    (beat,) = read_beats(tmp_path / "pulses")
    hung.send_signal(signal.SIGSTOP)
    assert stacks_of(tmp_path / "pulses", beat, patience=0.3) == (
        "(no stacks: the process does not run; was it stopped?)"
    )
    assert "gone" in stacks_of(tmp_path / "pulses", beat.model_copy(update={"pid": 2**22 - 1}))
    assert "it runs on elsewhere" in stacks_of(tmp_path / "pulses", beat.model_copy(update={"host": "elsewhere"}))


def test_every_phase_has_its_bound_and_progress_starts_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path, monkeypatch, seconds=100, phases={"saving": 10})
    watched.actors.stats = replace(STATS, waiting=0, running=0)
    pulse = Pulse(tmp_path / "pulses", "trainer 0")
    assert watched.after(0) == watched.after(1000) == []  # idle for as long as it likes
    with pulse.phase("learning"):
        assert watched.after(1) == watched.after(99) == []
        pulse.beat()
        assert watched.after(99) == watched.after(99) == []
        assert watched.after(2) == ["trainer 0"]
        assert watched.after(1000) == []  # said once
        pulse.beat()
        assert watched.after(1) == []
        assert watched.after(101) == ["trainer 0"]  # another time
        with pulse.phase("saving"):
            assert watched.after(1) == watched.after(9) == []
            assert watched.after(2) == ["trainer 0"]
    assert watched.actors.done == []


def test_who_waits_for_samples_is_not_stuck_while_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path, monkeypatch, seconds=100)
    with Pulse(tmp_path / "pulses", "trainer 0").phase("sampling"):
        for _ in range(5):
            assert watched.after(90) == []
            watched.samples()
        assert watched.after(1) == []
        assert watched.after(101) == ["rollout service"], "the trainer that waits for it is not to blame"
        watched.actors.stats = None
        assert watched.after(1) == []
        assert watched.after(101) == ["rollout service"]
        assert watched.run.said[-1]["phase"] == "silent"


def test_who_waits_for_a_teacher_is_not_to_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path, monkeypatch, seconds=100, action="replace")
    watched.actors.stats = replace(STATS, waiting=0, running=0)
    teacher = Pulse(tmp_path / "pulses", "teacher 1")
    with Pulse(tmp_path / "pulses", "trainer 0").phase("distilling"), teacher.phase("teaching"):
        assert watched.after(1) == watched.after(90) == []
        teacher.beat()
        assert watched.after(90) == []
        assert watched.after(101) == ["teacher 1"]
    assert watched.actors.done == ["teacher 1"] and watched.dog.verdict is None


def test_a_service_is_replaced_by_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path, monkeypatch, seconds=100, action="replace")
    watched.actors.stats = None
    assert watched.after(1) == []
    assert watched.after(101) == ["rollout service"]
    assert watched.actors.done == ["service"] and watched.dog.verdict is None


@pytest.mark.parametrize(("action", "again"), [("stop", False), ("replace", True)])
def test_a_trainer_that_hangs_ends_the_run(
    action: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path, monkeypatch, seconds=100, action=action)
    with Pulse(tmp_path / "pulses", "trainer 0").phase("learning"):
        assert watched.after(1) == []
        watched.samples()
        assert "trainer 0" in watched.after(101)
    verdict = watched.dog.verdict
    assert verdict is not None and verdict.again is again and watched.actors.done == ["stop"]
    expected = r"trainer 0 .* made no progress for 101 s in the phase learning"
    with pytest.raises(Stuck, match=expected), watched.dog.watching():
        raise RunFailed("a trainer died")


def test_a_run_goes_on_by_itself_so_many_times() -> None:
    lives: list[int] = []

    def work() -> None:
        lives.append(1)
        raise Stuck("hangs", again=True)

    with pytest.raises(Stuck):
        going_on(work)
    assert len(lives) == REPLACEMENTS + 1
    lives.clear()
    going_on(lambda: lives.append(1))
    assert len(lives) == 1


def test_several_threads_of_an_actor_may_be_in_phases(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "teacher 0")
    first, second = pulse.phase("teaching"), pulse.phase("teaching")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert read_beats(tmp_path)[0].phase == "teaching"
    second.__exit__(None, None, None)
    assert read_beats(tmp_path)[0].phase == "idle"


def test_a_look_that_fails_is_said_once_and_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def health(self: Actors, seconds: float) -> ServiceStats:
        looks.append(seconds)
        raise ValueError("what is this")

    monkeypatch.setattr(Actors, "health", health)
    run = Run(tmp_path)
    dog = Watchdog(WatchdogConfig(seconds=0.1), Actors(tmp_path / "pulses"), run, pytest.fail)  # type: ignore[arg-type]
    with dog.watching():
        end = time.monotonic() + 30
        while len(looks) < 3 and time.monotonic() < end:
            time.sleep(0.02)
    (record,) = run.said
    assert record["message"] == "the watchdog could not look at the actors: ValueError: what is this"
