"""What is shown of a student's teachers: on the live view, in report.json and on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from posttrain.observe.progress import live_table
from posttrain.observe.report import write_report
from posttrain.observe.runview import RunView
from posttrain.observe.teachers import distances, teacher_lines, work
from tests.observe_kit import write_run

STEPS = 30


def step(number: int, last: bool) -> dict[str, Any]:
    """Of a student with one teacher for arithmetic and two for letters; one joins for the last step."""
    metrics = {
        "kl": 0.5,
        "kl/arithmetic": 1.0 if number <= 10 else 0.25,
        "top1_agreement/arithmetic": 0.75,
        "entropy/arithmetic": 0.5,
        "teacher_entropy/arithmetic": 0.125,
        "completion_length/arithmetic": 4.0,
        "share/arithmetic": 0.8,
        "seconds_teacher/arithmetic": 0.5,
        "teacher_busy/arithmetic": 0.04,
        "teacher_bytes_returned/arithmetic": float(1 << 20),
        "kl/letters": 0.125,
    }
    if last:
        metrics |= {"kl/letters/large": 2.0, "seconds_teacher/large": 3.0, "seconds_teacher_load/large": 7.0}
        metrics |= {"teacher_bytes_loaded/large": float(5 << 20)}
    return {"time": 100.0 + number, "stage": "student", "step": number, "steps": STEPS, "metrics": metrics}


def records(finished: bool = False) -> list[dict[str, Any]]:
    found = [
        {"time": 100.0, "event": "run_started"},
        {"time": 100.0, "event": "stage_started", "stage": "student", "steps": STEPS},
    ]
    found += [step(number, number == STEPS) for number in range(1, STEPS + 1)]
    if finished:
        found += [{"time": 140.0, "event": "stage_finished", "stage": "student", "seconds": 40.0, "steps": STEPS}]
        found += [{"time": 141.0, "event": "run_finished", "status": "finished"}]
    return found


def test_means_are_over_recent_steps_and_totals_over_all() -> None:
    stage = RunView.of(records()).stage("student")
    first, letters, large = distances(stage)
    assert first == {
        "name": "arithmetic", "kl": 0.25, "top1_agreement": 0.75, "entropy": 0.5, "teacher_entropy": 0.125,
        "completion_length": 4.0, "share": 0.8,
    }  # fmt: skip
    assert (letters["name"], letters["kl"], letters["share"]) == ("letters", 0.125, None)
    assert (large["name"], large["kl"]) == ("letters/large", 2.0)
    own, other = work(stage)
    assert (own["seconds_teacher"], own["total_seconds_teacher"]) == (0.5, 0.5 * STEPS)
    assert own["total_teacher_bytes_returned"] == STEPS << 20
    assert (other["seconds_teacher"], other["total_seconds_teacher"], other["teacher_busy"]) == (3.0, 3.0, None)


def test_a_running_student_has_lines_for_domains_and_teachers_on_the_live_view() -> None:
    view = RunView.of(records(), ["base", "student"])
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(live_table(view, 131.0, 120))
    text = " ".join(console.export_text().split())  # lines are broken at the table's width
    assert "student on arithmetic: KL 0.25, top-1 75 %, entropy 0.5 (teacher 0.125), 4 tokens, 80 % of the" in text
    assert "teacher arithmetic: 0.5 s a step (busy 4 %), 1 MiB of states" in text
    assert text.endswith("teacher large: 3 s a step, loading 7 s")


def test_there_are_no_lines_without_a_running_student() -> None:
    assert teacher_lines(RunView.of(records(finished=True))) is None
    assert teacher_lines(RunView.of([], ["base", "student"])) is None
    assert teacher_lines(RunView.of(records()[:2])) is None, "started, but without a step"


def test_report_and_page_have_the_teachers(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", records(finished=True))).read_text()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in report["teachers"]["domains"]] == ["arithmetic", "letters", "letters/large"]
    assert [row["name"] for row in report["teachers"]["work"]] == ["arithmetic", "large"]
    assert "How far the student is from its teachers" in page and "75.0 %" in page
    assert "<td>15 s</td><td>4.0 %</td>" in page, "half a second in each of 30 steps"
    assert 'id="teachers"' not in write_report(write_run(tmp_path / "none", records()[:1])).read_text()
