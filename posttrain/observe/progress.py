"""The live view of a run: one table on a terminal, plain lines in a pipe and in log.txt."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from posttrain.observe.metrics import MetricsFollower, Record
from posttrain.observe.periodic import Periodic
from posttrain.observe.runview import STATUS_MARKS, RunView, StageView, record_time
from posttrain.observe.teachers import teacher_lines
from posttrain.observe.words import duration, number, percent

POLL_SECONDS = 0.5
DRAW_SECONDS = 1.5
"""Drawing the table takes some 10 ms of processor time, which the training wants."""
KEPT_STEPS = 40
"""Steps of history that the live view holds for each stage: enough for a steady rate."""


class LiveProgress:
    """Shows the progress of the run in `run_directory` while the `with` block runs, from a thread of its own.

    On a terminal: one table that is redrawn in place. Otherwise: plain lines on standard output, at most one a
    stage each `line_seconds` besides starts, ends and evaluations. The plain lines always go to log.txt as well.
    What is already in metrics.jsonl on entry (a resumed run) counts for the state, but is not announced again.
    """

    def __init__(
        self, run_directory: str | Path, stages: Sequence[str], slots: int = 1, line_seconds: float = 10.0
    ) -> None:
        """`stages`: the planned ones, in order; `slots`: how many experts are grown side by side (for the ETA)."""
        self._directory = Path(run_directory)
        self._follower = MetricsFollower(self._directory / "metrics.jsonl")
        self._view = RunView(stages, keep_steps=KEPT_STEPS)
        self._lines = PlainLines(self._view, line_seconds)
        self._screen = Screen(self._view, slots)
        self._thread = Periodic("live-progress", POLL_SECONDS, self._follow)
        self._log: int | None = None

    def __enter__(self) -> LiveProgress:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._log = os.open(self._directory / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        for record in self._follower.new_records():
            self._view.add(record)
        self._screen.start()
        self._take([])
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.stop()
        self._take(self._follower.new_records(), last=True)
        self._screen.stop()
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def _follow(self) -> None:
        self._take(self._follower.new_records())

    def _take(self, records: list[Record], last: bool = False) -> None:
        lines = [line for record in records for line in self._lines.of(record)]
        if lines and self._log is not None:
            os.write(self._log, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more; log.txt still has it
            self._screen.show(lines, last)


class Screen:
    """Standard output: on a terminal one table that is redrawn in place, elsewhere lines."""

    def __init__(self, view: RunView, slots: int = 1) -> None:
        self._view = view
        self._slots = slots
        self._live: Live | None = None
        self._next_drawing = 0.0

    def start(self) -> None:
        """From here on, where it is a terminal, the table stays at its end."""
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._live = Live(console=Console(file=sys.stdout), auto_refresh=False)
            self._live.start()

    def show(self, lines: list[str], last: bool = False) -> None:
        """The view as it is now, or the new lines. The last table is drawn in any case."""
        if self._live is None:
            if lines:
                print("\n".join(lines), flush=True)
        elif last or time.monotonic() >= self._next_drawing:
            self._next_drawing = time.monotonic() + DRAW_SECONDS
            table = live_table(self._view, time.time(), self._live.console.width, self._slots)
            self._live.update(table, refresh=True)

    def stop(self) -> None:
        """The table stays where it is."""
        if self._live is not None:
            self._live.stop()


class PlainLines:
    """Turns records into lines for a log, a few at the right moments. Feeds `view` on the way."""

    def __init__(self, view: RunView, line_seconds: float) -> None:
        self._view = view
        self._line_seconds = line_seconds
        self._last_line: dict[str, float] = {}

    def of(self, record: Record) -> list[str]:
        """Take `record` into the view; the lines that it is worth, with the clock in front."""
        self._view.add(record)
        when = record_time(record)
        text = self._event(record) if "event" in record else self._step(record, when)
        texts = [text] if text else []
        if record.get("warning"):
            texts.append(f"warning: {self._view.warnings[-1]}")
        clock = time.strftime("%H:%M:%S", time.localtime(when))
        stacks = str(record.get("stacks", "")).splitlines() if record.get("event") == "stuck" else []
        return [f"{clock} {' '.join(text.split())}" for text in texts] + [f"    {line}" for line in stacks]

    def _step(self, record: Record, when: float) -> str | None:
        name = record.get("stage")
        if not isinstance(name, str) or when - self._last_line.get(name, 0.0) < self._line_seconds:
            return None
        self._last_line[name] = when
        stage = self._view.stage(name)
        parts = [f"{name}: step {stage.step}/{stage.steps}"]
        rate, left = stage.steps_per_second(), stage.seconds_left(when)
        if rate:
            parts.append(f"{number(rate)} steps/s")
        if left is not None:
            parts.append(f"ETA {duration(left)}")
        return ", ".join(parts + _measures(stage))

    def _event(self, record: Record) -> str | None:
        stage, event = str(record.get("stage", "")), record["event"]
        if event == "stage_started":
            self._last_line[stage] = record_time(record)
            begins = f"goes on after step {record['step']}" if record.get("step") else "started"
            return f"{stage} {begins}" + (f": {record['steps']} steps" if record.get("steps") else "")
        if event == "stage_finished":
            view = self._view.stage(stage)
            return ", ".join([f"{stage} finished in {duration(view.seconds())}", *_measures(view)])
        if event == "stage_failed":
            return f"{stage} FAILED: {record.get('error', 'no reason given')}"
        if event == "evaluated":
            low, high = record.get("ci95") or (None, None)
            interval = f" (95 %: {percent(low)} to {percent(high)})" if low is not None else ""
            split = record.get("split", "holdout")
            what = f"{record.get('n')} {'held-out' if split == 'holdout' else split} problems"
            model, share = record.get("model", stage), percent(record.get("pass@1"))
            return f"{model} on {record.get('domain')}: pass@1 {share}{interval}, {what}"
        if event == "gate":
            verdict = "passed" if record.get("passed") else f"NOT passed ({record.get('action', 'warn')})"
            values = f"{percent(record.get('parent'))} -> {percent(record.get('value'))}"
            return f"gate of {stage}: {verdict}, {values}, needed gain {percent(record.get('min_gain'))}"
        if event == "warning":
            return f"warning: {self._view.warnings[-1]}"
        if event == "stuck":
            return f"STUCK: {record.get('message')}; action: {record.get('action')}"
        if event == "dashboard":
            return f"Ray's dashboard: {record.get('address')}"
        if event == "run_started":
            return "run started"
        if event == "run_finished":
            error = f": {record['error']}" if record.get("error") else ""
            return f"run {record.get('status', 'finished')} after {duration(self._view.seconds)}{error}"
        return None


def _measures(stage: StageView) -> list[str]:
    latest = stage.latest
    return [f"{key} {number(latest[key])}" for key in ("loss", "reward", "kl") if key in latest]


STATUS_STYLES = {
    "pending": "dim",
    "given": "green",
    "running": "bold cyan",
    "finished": "green",
    "failed": "bold red",
    "interrupted": "yellow",
    "dropped": "yellow",
}
WIDE = 100
"""Columns that a terminal needs for the whole table; on a narrower one `steps/s` and `loss` are left out."""


def live_table(view: RunView, now: float, width: int, slots: int = 1) -> Table:
    """A row a stage: status, step, rate, ETA, loss, reward, KL, accuracy, seconds.

    The accuracy is the held-out pass@1 in an expert's own domain, of other models the mean over the domains.
    """
    table = Table(
        title=_headline(view, now, slots),
        title_justify="left",
        title_style="",
        caption=_caption(view),
        caption_justify="left",
        caption_style="dim",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("stage", no_wrap=True)
    names = ["step", "steps/s", "ETA", "loss", "reward", "KL", "accuracy", "time"]
    hidden = set() if width >= WIDE else {"steps/s", "loss"}
    for name in names:
        if name not in hidden:
            table.add_column(name, justify="right", no_wrap=True)
    for stage in view.stages.values():
        cells = dict(zip(names, _cells(view, stage, now), strict=True))
        first = Text(f"{STATUS_MARKS[stage.status]} {stage.name}", style=STATUS_STYLES[stage.status])
        table.add_row(first, *(cell for name, cell in cells.items() if name not in hidden))
    return table


def _cells(view: RunView, stage: StageView, now: float) -> list[str]:
    latest, running = stage.latest, stage.status == "running"
    rate = stage.steps_per_second() if running else None
    left = stage.seconds_left(now) if running else None
    accuracy = view.accuracy(stage.name)
    own = accuracy.get(stage.name.split("/")[1]) if stage.name.startswith("expert/") else None
    shown = own if own is not None else fmean(accuracy.values()) if accuracy else None
    return [
        f"{stage.step}/{stage.steps}" if stage.steps else "",
        number(rate) if rate else "",
        duration(left) if left is not None else "",
        *(number(latest[key]) if key in latest else "" for key in ("loss", "reward", "kl")),
        percent(shown) if shown is not None else "",
        "" if stage.started is None else duration(stage.seconds(now)),
    ]


def _caption(view: RunView) -> Text | None:
    """What is below the table: queues, and the student's teachers."""
    lines = [line for line in (_rollouts(view), teacher_lines(view)) if line is not None]
    return Text("\n").join(lines) if lines else None


def _rollouts(view: RunView) -> Text | None:
    """The rollout service's queues and who waits, while something runs that needs it."""
    running = [stage for stage in view.stages.values() if stage.status == "running"]
    if view.finish is not None or not running or not view.events.get("queues"):
        return None
    queues = view.events["queues"][-1]
    parts = [
        f"rollouts: {number(queues.get('waiting'))} waiting, {number(queues.get('running'))} running, "
        f"{number(queues.get('ready_groups'))} groups ready",
        f"{number(queues.get('workers'))} workers",
        f"{number(queues.get('tokens_per_second'))} tokens/s",
        f"generators idle {percent(queues.get('generators_idle'), 0)}",
    ]
    for stage in running:
        latest = stage.latest
        if latest.get("seconds_step") and "seconds_generate" in latest:
            share = latest["seconds_generate"] / latest["seconds_step"]
            parts.append(f"trainer of {stage.name} waits {percent(share, 0)}")
    return Text(" · ".join(parts))


def _headline(view: RunView, now: float, slots: int) -> Text:
    elapsed = view.seconds or 0.0
    if view.finish is None and view.attempts:
        elapsed += max(0.0, now - view.attempts[-1][1])
    parts = [f"{duration(elapsed)} elapsed"]
    left = seconds_left(view, now, slots)
    if left is not None and view.finish is None:
        parts.append(f"about {duration(left)} left")
    if view.warnings:
        parts.append(f"{len(view.warnings)} warning{'s' if len(view.warnings) > 1 else ''}: {view.warnings[-1]}")
    return Text(" · ".join(parts))


def seconds_left(view: RunView, now: float, slots: int = 1) -> float | None:
    """A rough estimate of the whole run's remaining seconds, None until one stage's duration can be told.

    A stage that has not begun is taken to last as long as those of its kind (the last part of its name), else as
    the mean of all; `slots` experts are grown side by side, before and after them everything is in a row.
    """
    left: dict[str, float] = {}
    total: dict[str, float] = {}
    for name, stage in view.stages.items():
        if stage.status in ("finished", "given", "dropped"):
            left[name] = 0.0
        elif stage.status == "running" and (remaining := stage.seconds_left(now)) is not None:
            left[name] = remaining
        if name in left and (spent := stage.seconds(now)) is not None:
            total[name] = spent + left[name]
    if not total:
        return None
    chains: dict[str, float] = {}
    for name in view.stages:
        kind = name.rpartition("/")[2]
        alike = [seconds for other, seconds in total.items() if other.rpartition("/")[2] == kind]
        expected = left.get(name, fmean(alike or total.values()))
        chain = "/".join(name.split("/")[:2]) if name.startswith("expert/") else name
        chains[chain] = chains.get(chain, 0.0) + expected
    experts = [seconds for chain, seconds in chains.items() if chain.startswith("expert/")]
    return sum(chains.values()) - sum(experts) + max(max(experts, default=0.0), sum(experts) / slots)
