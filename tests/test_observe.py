"""Metrics log, intervals, live progress and resource monitor."""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import math
import multiprocessing
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.observe.environment import describe_environment
from posttrain.observe.intervals import accuracy_interval, binomial_interval
from posttrain.observe.metrics import MetricsFollower, MetricsLog, read_metrics
from posttrain.observe.periodic import Periodic
from posttrain.observe.progress import POLL_SECONDS, LiveProgress, PlainLines, live_table, seconds_left
from posttrain.observe.resources import ResourceMonitor, kind_of_command
from posttrain.observe.runview import RunView
from posttrain.observe.words import duration, number, percent, points, size
from tests.observe_kit import SECONDS, START, finished_run, recipe, write_many

# --- metrics.jsonl


def test_a_step_and_an_event_are_read_as_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write("base", 3, 10, {"loss": 0.5, "tokens": 7})
    log.event("evaluated", model="base", checkpoint=tmp_path, **{"pass@1": 0.25}, ci95=(0.2, 0.3))
    step, event = read_metrics(log.path)
    assert abs(step.pop("time") - time.time()) < 60
    assert step == {"stage": "base", "step": 3, "steps": 10, "metrics": {"loss": 0.5, "tokens": 7}}
    assert (event["event"], event["pass@1"], event["ci95"]) == ("evaluated", 0.25, [0.2, 0.3])
    assert event["checkpoint"] == str(tmp_path)


def test_values_that_are_not_finite_become_null_with_a_warning(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("base", 1, 2, {"loss": math.nan, "kl": -math.inf, "reward": 1.0})
    log.event("rollout_stats", weight_sync_seconds=[0.1, math.inf])
    step, event = read_metrics(log.path)
    assert step["metrics"] == {"loss": None, "kl": None, "reward": 1.0}
    assert "loss" in step["warning"] and "kl" in step["warning"] and "reward" not in step["warning"]
    assert event["weight_sync_seconds"] == [0.1, None] and "weight_sync_seconds[1]" in event["warning"]
    assert "NaN" not in log.path.read_text() and "Infinity" not in log.path.read_text()


def test_scalars_of_numpy_and_torch_become_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    values = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": torch.tensor(float("nan"))}
    log.write("base", 1, 1, values)
    assert read_metrics(log.path)[0]["metrics"] == {"a": 0.5, "b": 3, "c": 0.25, "d": None}


def test_lines_of_processes_that_write_at_once_are_never_mixed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.event("run_started")  # the descriptor is open when the log is sent to the others
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(log, index)) for index in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert len(records) == 1 + 3 * 200
    for index in range(3):
        assert [r["step"] for r in records if r.get("stage") == f"stage-{index}"] == list(range(200))


def test_who_opens_the_file_waits_for_a_line_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as a writer does, whose line is half visible
        file.write(b'{"event": "fi')
        second = threading.Thread(target=MetricsLog(path).event, args=("second",))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        file.write(b'rst"}\n')
    second.join(60)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["first", "second"]


def test_a_torn_last_line_is_left_out_and_the_next_writer_does_not_lose_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).event("first")
    with path.open("ab") as file:
        file.write('{"time": 1.0, "event": "törn'.encode()[:-3])  # the writer was killed inside a character
    assert [record["event"] for record in read_metrics(path)] == ["first"]
    MetricsLog(path).event("second")
    assert [record["event"] for record in read_metrics(path)] == ["first", "second"]


def test_a_follower_gets_each_record_once_and_half_a_line_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.new_records() == []
    path.write_bytes(b'{"event": "a"}\n{"event": ')
    assert follower.new_records() == [{"event": "a"}]
    assert follower.new_records() == []
    with path.open("ab") as file:
        file.write(b'"b"}\n[1]\n\n')
    assert follower.new_records() == [{"event": "b"}]


# --- intervals


def test_the_binomial_interval_agrees_with_published_values() -> None:
    # Newcombe (1998), table I, method 3 (Wilson without continuity correction).
    for correct, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert binomial_interval(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert binomial_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError):
        binomial_interval(5, 4)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_mirrors(trial: tuple[int, int]) -> None:
    correct, n = trial
    low, high = binomial_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    mirrored = binomial_interval(n - correct, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_several_samples_a_problem_narrow_the_interval_only_as_far_as_they_are_independent() -> None:
    one = [1.0] * 60 + [0.0] * 40
    assert accuracy_interval(one) == pytest.approx(binomial_interval(60, 100))
    assert accuracy_interval(one, samples=8) == pytest.approx(binomial_interval(60, 100)), "all answers agree"
    spread = [0.6] * 100
    assert accuracy_interval(spread, samples=5) == pytest.approx(binomial_interval(300, 500)), "as if independent"
    assert accuracy_interval([1.0] * 10, samples=4) == pytest.approx(binomial_interval(10, 10))
    assert accuracy_interval([]) == (0.0, 1.0)


def test_the_interval_of_problem_means_covers_the_truth_in_95_of_100_cases() -> None:
    generator = np.random.default_rng(0)
    problems, samples, covered, trials = 200, 4, 0, 2000
    for _ in range(trials):
        difficulty = generator.beta(0.8, 0.8, size=problems)  # mean 0.5, answers to one problem strongly alike
        means = generator.binomial(samples, difficulty) / samples
        low, high = accuracy_interval(means.tolist(), samples)
        covered += low <= 0.5 <= high
    assert 0.935 <= covered / trials <= 0.965


# --- the view of a run


def test_a_stage_that_starts_again_forgets_the_steps_of_the_first_attempt() -> None:
    def step(time: float, number: int, loss: float) -> dict:
        return {"time": time, "stage": "base", "step": number, "steps": 4, "metrics": {"loss": loss}}

    def started(time: float, **fields: int) -> list[dict]:
        return [
            {"time": time, "event": "run_started"},
            {"time": time, "event": "stage_started", "stage": "base", **fields},
        ]

    first = [*started(0), step(1, 1, 9.0), step(2, 2, 8.0), step(3, 3, 7.0)]
    again = RunView.of([*first, *started(100), step(101, 1, 5.0)]).stages["base"]
    assert [(number, metrics["loss"]) for number, _, metrics in again.history] == [(1, 5.0)]
    onward = RunView.of([*first, *started(100, step=2), step(101, 3, 5.0)]).stages["base"]
    assert [(number, metrics["loss"]) for number, _, metrics in onward.history] == [(1, 9.0), (2, 8.0), (3, 5.0)]


def test_pauses_between_attempts_and_later_evaluations_are_not_wall_time() -> None:
    view = RunView.of([{"time": 0, "event": "run_started"}, {"time": 10, "event": "stage_started", "stage": "base"}])
    assert view.finish is None
    for record in [
        {"time": 1000, "event": "run_started"},
        {"time": 1005, "event": "run_finished", "status": "finished"},
    ]:
        view.add(record)
    view.add({"time": 99_999, "event": "evaluated", "model": "base", "domain": "d", "pass@1": 0.5, "n": 4})
    assert view.seconds == 15
    assert view.finish is not None and view.finish["status"] == "finished"
    assert view.stages["base"].status == "interrupted", "its attempt was killed"


def test_results_on_selection_problems_are_never_taken_for_results() -> None:
    fields = {"event": "evaluated", "model": "base", "domain": "d", "n": 4}
    view = RunView.of(
        [{"time": 1, **fields, "pass@1": 0.5}, {"time": 2, **fields, "pass@1": 1.0, "split": "selection"}]
    )
    assert view.accuracy("base") == {"d": 0.5}


# --- live progress


def test_plain_lines_are_at_most_one_a_stage_in_ten_seconds_besides_the_events() -> None:
    records = finished_run()
    lines = PlainLines(RunView(), line_seconds=10.0)
    by_record = [(record, lines.of(record)) for record in records]
    for stage in ("base", "expert/letters/grpo", "student"):
        times = [
            record["time"] for record, out in by_record if out and record.get("stage") == stage and "metrics" in record
        ]
        assert len(times) > 3
        assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(times))
    text = "\n".join(line for _, out in by_record for line in out)
    assert "base started: 120 steps" in text
    assert "expert/arithmetic/grpo finished in 3m 10s" in text
    assert "student on letters: pass@1 " in text and "256 held-out problems" in text
    assert "gate of expert/letters/grpo: passed" in text
    assert "ETA" in text and "reward" in text and "kl" in text
    assert text.endswith("run finished after 10m 00s")


def test_a_loss_that_is_not_finite_is_announced() -> None:
    lines = PlainLines(RunView(), line_seconds=10.0)
    record = {
        "time": START,
        "stage": "base",
        "step": 7,
        "steps": 9,
        "metrics": {"loss": None},
        "warning": "not finite: loss",
    }
    assert any("warning: base step 7: not finite: loss" in line for line in lines.of(record))


def test_the_whole_run_is_estimated_from_stages_of_the_same_kind() -> None:
    plan = recipe().stage_names()
    records = finished_run()

    def at(now: float, slots: int) -> float | None:
        return seconds_left(RunView.of([record for record in records if record["time"] <= now], plan), now, slots)

    half = START + 5 + SECONDS["base"] / 2
    # Half of base is left; then come three stages in a row (five with one slot), of which nothing is known but base.
    assert at(half, slots=2) == pytest.approx(3.5 * SECONDS["base"], rel=0.05)
    assert at(half, slots=1) == pytest.approx(5.5 * SECONDS["base"], rel=0.05)
    student = next(record["time"] for record in records if record.get("stage") == "student") + SECONDS["student"] / 2
    assert at(student, slots=2) == pytest.approx(SECONDS["student"] / 2, rel=0.05), "only the student is left"
    assert at(START, slots=2) is None


def test_initial_weights_that_were_evaluated_are_not_waited_for() -> None:
    view = RunView(["base", "student"])
    view.add({"time": START, "event": "evaluated", "model": "base", "domain": "letters", "pass@1": 0.1, "n": 8})
    assert view.stages["base"].status == "given"
    for step in (1, 2, 3):
        view.add({"time": START + step, "stage": "student", "step": step, "steps": 10, "metrics": {}})
    assert seconds_left(view, START + 3) == pytest.approx(7)


def _show(progress: LiveProgress, log: MetricsLog) -> None:
    with progress:
        log.event("stage_started", stage="base", steps=2)
        log.write("base", 1, 2, {"loss": 0.5})
        log.write("base", 2, 2, {"loss": 0.25})
        log.event("stage_finished", stage="base", seconds=1.0, steps=2)
        log.event("evaluated", model="base", domain="letters", n=8, ci95=[0.3, 0.7], **{"pass@1": 0.5})


def test_without_a_terminal_plain_lines_go_to_standard_output_and_to_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.event("stage_started", stage="earlier-attempt")
    (tmp_path / "log.txt").write_text("from before\n")
    _show(LiveProgress(tmp_path, ["base", "student"]), log)
    out = capsys.readouterr().out
    assert "base started: 2 steps" in out and "base on letters: pass@1 50.0 %" in out
    assert "\x1b" not in out and "earlier-attempt" not in out
    assert (tmp_path / "log.txt").read_text() == "from before\n" + out


def test_on_a_terminal_one_table_is_drawn_and_the_lines_go_to_the_log_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, terminal = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                seen.extend(os.read(controller, 65536))
            except OSError:  # the terminal was closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        _show(LiveProgress(tmp_path, ["base", "student"]), MetricsLog(tmp_path / "metrics.jsonl"))
        monkeypatch.undo()
    reader.join(10)
    os.close(controller)
    text = seen.decode()
    assert "steps/s" in text and "✓ base" in text and "50.0 %" in text and "· student" in text
    assert "base started" not in text and "base started: 2 steps" in (tmp_path / "log.txt").read_text()


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    from rich.console import Console

    view = RunView.of([record for record in finished_run() if record["time"] < START + 230])
    out = io.StringIO()
    Console(file=out, width=80).print(live_table(view, START + 230, width=80))
    assert "expert/arithmetic/grpo" in out.getvalue() and "…" not in out.getvalue()
    assert max(len(line.rstrip()) for line in out.getvalue().splitlines()) <= 80


def test_following_a_busy_run_takes_little_processor_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    progress = LiveProgress(tmp_path, ["base"])
    spent = 0.0

    def follow() -> None:
        nonlocal spent
        progress._follow()
        spent = time.thread_time()

    progress._thread = Periodic("timed", POLL_SECONDS, follow)
    with progress:
        for step in range(40):  # two stages at ten steps a second each
            log.write("base", step, 40, {"loss": 1.0, "reward": 0.5, "kl": 0.1})
            log.write("student", step, 40, {"loss": 1.0, "reward": 0.5, "kl": 0.1})
            time.sleep(0.05)
    assert spent < 0.01 * 2.0 + 0.01, "1 % of one core, and 10 ms for the start"


def test_what_costs_much_is_done_less_often() -> None:
    calls = {"cheap": 0, "dear": 0}

    def cheap() -> None:
        calls["cheap"] += 1

    def dear() -> None:
        calls["dear"] += 1
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass

    threads = [Periodic(do.__name__, 0.05, do, share=0.005) for do in (cheap, dear)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    for thread in threads:
        thread.stop()
    assert calls["dear"] == 1 and calls["cheap"] > 5  # 10 ms are half a percent of two seconds


# --- resources

HOLD = "import sys, time; block = bytearray(int(sys.argv[1]) << 20); block[::4096] = b'x' * len(block[::4096]); "
HOLD += "print('ready', flush=True); time.sleep(20)"


def test_memory_of_children_is_counted_and_of_strangers_is_not(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with subprocess.Popen([sys.executable, "-c", HOLD, "120"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        with ResourceMonitor(child.pid, log) as monitor:
            pass
        child.kill()
    assert 120 << 20 < monitor.peak_bytes < 200 << 20
    assert 110 << 20 < monitor.peak_pss_bytes <= monitor.peak_bytes
    assert monitor.peak_by_process_kind == {"driver": monitor.peak_bytes}
    last = read_metrics(log.path)[-1]
    assert last["event"] == "resources" and last["peak_rss_bytes"] == monitor.peak_bytes
    with ResourceMonitor(os.getpid()) as own:
        pass
    assert own.cpu_seconds > 0 and own.peak_bytes > 10 << 20


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    monitor = ResourceMonitor()
    monitor.sample()
    with subprocess.Popen([sys.executable, "-c", HOLD, "150"], stdout=subprocess.PIPE) as child:
        before = monitor.peak_bytes
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        monitor.sample()
        child.kill()
    peak = monitor.peak_bytes
    monitor.sample()
    assert peak > before + (150 << 20) and monitor.peak_bytes == peak
    assert monitor.fields()["rss_bytes"] < peak - (140 << 20)


def test_a_process_whose_parent_dies_stays_counted() -> None:
    shell = f'{sys.executable} -c "{HOLD}" 100 & echo $!; wait'
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        try:
            assert parent.stdout.readline() == b"ready\n"
            monitor = ResourceMonitor(os.getpid())
            monitor.sample()
            parent.kill()
            parent.wait()
            monitor.sample()
            assert Path(f"/proc/{orphan}").exists()
            assert monitor._tree() and orphan in {process.key[0] for process in monitor._tree()}
        finally:
            os.kill(orphan, 9)


def test_shared_pages_count_for_each_process_in_rss_and_once_in_pss() -> None:
    script = (
        "import os, time; block = bytearray(b'x' * (100 << 20)); os.fork(); os.write(1, b'ready\\n'); time.sleep(20)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() + child.stdout.readline() == b"ready\nready\n"
        monitor = ResourceMonitor(child.pid)
        monitor.sample()
        for process in monitor._tree():
            os.kill(process.key[0], 9)
    assert monitor.peak_bytes > 200 << 20
    assert monitor.peak_pss_bytes < 150 << 20


def test_everything_that_ray_starts_is_counted_by_kind() -> None:
    import ray

    with ResourceMonitor() as monitor:
        ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, logging_level="error")
        try:

            @ray.remote
            class Holder:
                def hold(self) -> int:
                    self.block = bytearray(b"x" * (100 << 20))
                    return os.getpid()

            holder = Holder.remote()
            pid = ray.get(holder.hold.remote())
            assert pid in {process.key[0] for process in monitor._tree()}
            monitor.sample()
        finally:
            ray.shutdown()
    assert monitor.peak_by_process_kind["actor Holder"] > 150 << 20
    assert monitor.peak_by_process_kind["Ray"] > 50 << 20, "gcs_server, raylet, log monitor"


def test_processes_are_told_apart_by_their_command_lines() -> None:
    kinds = {
        "ray::Trainer.train": "actor Trainer",
        "ray::Trainer": "actor Trainer",
        "ray::IDLE": "Ray idle workers",
        "ray::DashboardAgent": "Ray",
        "ray-dashboard-StateHead-0 (/x/bin/python -B -c": "Ray dashboard",
        "/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/ray/session_1": "Ray",
        "/x/bin/python -u /x/ray/_private/log_monitor.py --session-dir=/tmp": "Ray",
        "ray::RuntimeEnvAgent": "Ray",
        "VLLM::EngineCore": "vLLM",
        "/x/bin/python -c from multiprocessing.resource_tracker import main": "other",
    }
    assert {command: kind_of_command(command) for command in kinds} == kinds


# --- words and environment


def test_numbers_are_written_for_people() -> None:
    assert [duration(s) for s in (None, 0.026, 4.25, 59.4, 65, 3723)] == [
        "–",
        "0.026 s",
        "4.2 s",
        "59 s",
        "1m 05s",
        "1h 02m 03s",
    ]
    assert [number(v) for v in (None, 0, 3, 0.012345, 1234.5, 4.1e-7, 1e-5)] == [
        "–",
        "0",
        "3",
        "0.0123",
        "1,234",
        "4.1e-7",
        "1e-5",
    ]
    assert (percent(0.8437), points(-0.052), points(0.2)) == ("84.4 %", "−5.2", "+20.0")
    assert [size(v) for v in (None, 5 << 20, 3 << 30)] == ["–", "5 MiB", "3.00 GiB"]


def test_the_environment_names_versions_and_machine() -> None:
    environment = describe_environment()
    assert environment["python"].startswith("3.") and environment["cores"] >= 1
    assert environment["packages"]["torch"] and environment["packages"]["ray"]
    json.dumps(environment, allow_nan=False)
