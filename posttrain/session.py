"""What surrounds a run: its data, its cluster, its live view, and an orderly end whatever happens."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.cluster import Cluster, check_dashboard, start_cluster
from posttrain.data import DomainData, load_domains
from posttrain.data.rows import check_problems
from posttrain.errors import BadInput, RunFailed
from posttrain.interrupts import ignored
from posttrain.observe.environment import describe_environment
from posttrain.observe.progress import LiveProgress
from posttrain.observe.report import write_report
from posttrain.observe.resources import ResourceMonitor
from posttrain.observe.trackers import check_trackers
from posttrain.observe.tracking import Tracking
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory, RunStatus
from posttrain.watchdog import Watchdog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.stages.origin import Changed
    from posttrain.stages.work import Work


@contextmanager
def session(recipe: Recipe, run: RunDirectory, changed: Changed = "refuse") -> Iterator[tuple[Work, Path]]:
    """Prepare a run, yield its `Work` and the initial checkpoint, and write status and report at the end.

    Args:
        changed: what becomes of stages that were begun with something else.

    Raises:
        BadInput: found while preparing; nothing was started then.
        RunFailed: the work failed; the run can be resumed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    began = time.time()
    print("Preparing problems, tokenizer and initial weights", flush=True)
    try:
        domains, tokenizer, initial = _prepare(recipe, run, changed)
    except KeyboardInterrupt:
        run.set_status("interrupted")
        raise
    settings = recipe.cluster
    slots = min(settings.trainers, settings.rollout_workers)
    with (
        _recorded_end(run),
        LiveProgress(run.path, recipe.stage_names(), slots),
        _recorded_attempt(run, began),
        ResourceMonitor(log=run.metrics),
    ):
        print(
            f"Starting {'Ray' if settings.address is None else 'actors'}: {settings.trainers} trainer(s), "
            f"{settings.rollout_workers} rollout worker(s)",
            flush=True,
        )
        with start_cluster(recipe, run.path / "engine", run.path) as cluster:
            from posttrain.stages.work import Work

            _announce(cluster, run)
            work = Work(recipe, run, domains, tokenizer, cluster)
            watchdog = Watchdog(recipe.watchdog, cluster, run, work.interrupt)
            with Tracking(run.path, recipe), watchdog.watching():
                yield work, initial


def _environment(recipe: Recipe) -> dict[str, object]:
    kernels = recipe.model.kernels or ("triton" if recipe.cluster.gpus_per_worker else "compiled")
    return {**describe_environment(), "kernels": kernels if recipe.model.family == "deepseek_v4" else "transformers"}


@contextmanager
def _recorded_attempt(run: RunDirectory, began: float) -> Iterator[None]:
    """The beginning (unix seconds) and the end of the work, for the live view as well."""
    run.set_status("running")
    run.append_event({"event": "run_started", "time": began, "environment": _environment(run.recipe)})
    status: RunStatus = "failed"
    error: str | None = None
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status, error = "interrupted", "stopped by the user"
        raise
    except BaseException as failure:
        error = str(failure) if isinstance(failure, BadInput | RunFailed) else f"{type(failure).__name__}: {failure}"
        raise
    finally:
        with ignored():
            run.append_event({"event": "run_finished", "status": status, "error": error})
            run.set_status(status)


@contextmanager
def _recorded_end(run: RunDirectory) -> Iterator[None]:
    """The report, however the run ended."""
    try:
        yield
    except BaseException:
        with ignored():
            try:
                write_report(run.path)
            except Exception as error:  # must not hide why the run ended
                print(f"the report could not be written: {error}", file=sys.stderr)
        raise
    write_report(run.path)


def _prepare(
    recipe: Recipe, run: RunDirectory, changed: Changed
) -> tuple[dict[str, DomainData], PreTrainedTokenizerBase, Path]:
    """Data, tokenizer and initial weights: everything that can be wrong with the user's input."""
    from posttrain.stages.hooks import check_hooks
    from posttrain.stages.initial import initial_checkpoint, tokenizer_for
    from posttrain.stages.origin import reconcile
    from posttrain.stages.scoring import check_rewards

    check_dashboard(recipe)
    domains = load_domains(recipe)
    check_rewards(recipe, domains)
    check_hooks(recipe)
    check_trackers(recipe)
    tokenizer = tokenizer_for(recipe, run)
    check_data(recipe, tokenizer, domains)
    reconcile(recipe, run, domains, changed)
    initial = initial_checkpoint(recipe, run, tokenizer)
    describe_engine(recipe, initial, run.path / "engine")
    return domains, tokenizer, initial


def check_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: dict[str, DomainData]) -> None:
    """Raise BadInput for problems, episodes or conversations that cannot be written, or do not fit the lengths; so too
    for answers that are to be judged."""
    from posttrain.stages.episodes import check_episodes
    from posttrain.stages.judging import check_judge_prompts
    from posttrain.stages.sft import check_conversations

    check_problems(recipe, tokenizer, domains)
    check_judge_prompts(recipe, tokenizer, domains)
    check_episodes(recipe, tokenizer, domains)
    check_conversations(recipe, tokenizer, domains)


def describe_engine(recipe: Recipe, checkpoint: Path, directory: Path) -> None:
    """Write what rollout engines are started from, and raise BadInput when they could not serve the recipe."""
    from rollouts.engine import check_context
    from rollouts.settings import engine_kind, engine_settings, write_description

    kind = engine_kind(recipe.model.family, recipe.rollout)
    write_description(checkpoint, directory, kind)
    check_context(engine_settings(directory, kind, recipe.rollout, recipe.cluster.threads))


def _announce(cluster: Cluster, run: RunDirectory) -> None:
    """Ray's dashboard: the plain lines show the event, the live table does not."""
    if cluster.dashboard:
        run.append_event({"event": "dashboard", "address": cluster.dashboard, "metrics": cluster.metrics})
        if sys.stdout.isatty():
            print(f"Ray's dashboard: {cluster.dashboard}")
