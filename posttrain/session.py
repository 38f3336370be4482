"""What surrounds a run: its data, its cluster, its live view, and an orderly end whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.cluster import start_cluster
from posttrain.data import load_domains
from posttrain.data.rows import check_problems
from posttrain.errors import BadInput, RunFailed
from posttrain.observe.environment import describe_environment
from posttrain.observe.progress import LiveProgress
from posttrain.observe.report import write_report
from posttrain.observe.resources import ResourceMonitor
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory, RunStatus

if TYPE_CHECKING:
    from posttrain.stages.work import Work


@contextmanager
def session(recipe: Recipe, run: RunDirectory) -> Iterator[tuple[Work, Path]]:
    """Prepare a run, yield its `Work` and the initial checkpoint, and write status and report at the end.

    Raises:
        BadInput: found while preparing; nothing was started then.
        RunFailed: the work failed; the run can be resumed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    domains, tokenizer, initial = _prepare(recipe, run)
    run.set_status("running")
    run.append_event({"event": "run_started", "environment": describe_environment()})
    status: RunStatus = "failed"
    error: str | None = None
    try:
        with ResourceMonitor(log=run.metrics), LiveProgress(run.path, recipe.stage_names()):
            with start_cluster(recipe, run.path, _engine_description(recipe, run, initial)) as cluster:
                from posttrain.stages.work import Work

                if cluster.dashboard:
                    run.append_event({"event": "dashboard", "address": cluster.dashboard})
                yield Work(recipe, run, domains, tokenizer, cluster), initial
        status = "finished"
    except KeyboardInterrupt:
        status, error = "interrupted", "stopped by the user"
        raise
    except (BadInput, RunFailed) as failure:
        error = str(failure)
        raise
    finally:
        run.append_event({"event": "run_finished", "status": status, "error": error})
        run.set_status(status)
        write_report(run.path)


def _prepare(recipe: Recipe, run: RunDirectory) -> tuple:
    """Data, tokenizer and initial weights: everything that can be wrong with the user's input."""
    from posttrain.stages.initial import initial_checkpoint, tokenizer_for

    domains = load_domains(recipe)
    tokenizer = tokenizer_for(recipe, run)
    check_problems(recipe, tokenizer, domains)
    return domains, tokenizer, initial_checkpoint(recipe, run, tokenizer)


def _engine_description(recipe: Recipe, run: RunDirectory, initial: Path) -> Path:
    from rollouts.settings import engine_kind, write_description

    directory = run.path / "engine"
    write_description(initial, directory, engine_kind(recipe.model.family, recipe.rollout))
    return directory
