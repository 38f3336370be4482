"""`posttrain watch`: looks on while another process drives a run, or shows how it ended."""

from __future__ import annotations

import time
from pathlib import Path

from posttrain.observe.metrics import MetricsFollower
from posttrain.observe.progress import KEPT_STEPS, POLL_SECONDS, PlainLines, Screen
from posttrain.observe.runview import RunView, record_time
from posttrain.recipe import read_recipe
from posttrain.rundir import driver_of

PAST_LINES = 20
"""Of what has happened already, where the output is no terminal."""
LINE_SECONDS = 10.0


def watch(run_dir: str | Path) -> bool:
    """Show the run in `run_dir` until it ends; a table on a terminal, lines elsewhere.

    Returns:
        Whether the run has come to an end; False when its process was killed, or it was never started.

    Raises:
        BadInput: no run directory.
    """
    run_dir = Path(run_dir)
    recipe = read_recipe(run_dir / "recipe.yaml")
    view = RunView(recipe.stage_names(), keep_steps=KEPT_STEPS)
    lines, follower = PlainLines(view, LINE_SECONDS), MetricsFollower(run_dir / "metrics.jsonl")
    screen = Screen(view, min(recipe.cluster.trainers, recipe.cluster.rollout_workers))
    screen.start()
    try:
        screen.show([line for record in follower.new_records() for line in lines.of(record)][-PAST_LINES:])
        while driver_of(run_dir) is not None and not _ended(view, run_dir):
            time.sleep(POLL_SECONDS)
            screen.show([line for record in follower.new_records() for line in lines.of(record)])
        screen.show([line for record in follower.new_records() for line in lines.of(record)], last=True)
    finally:
        screen.stop()
    return view.finish is not None


def _ended(view: RunView, run_dir: Path) -> bool:
    """Whether the run's end was recorded, and it was not taken up again since."""
    return view.finish is not None and record_time(view.finish) >= (run_dir / "lock").stat().st_mtime
