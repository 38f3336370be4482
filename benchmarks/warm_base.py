"""What comparisons of a stage begin with: the processes of a recipe, and one base model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.cluster import start_cluster
from posttrain.data import load_domains
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory
from posttrain.session import describe_engine
from posttrain.stages.initial import initial_checkpoint, tokenizer_for
from posttrain.stages.sft import run_sft
from posttrain.stages.work import Work


@contextmanager
def warm_base(recipe: Recipe, domain: str) -> Iterator[tuple[Work, Path]]:
    """Start the recipe's actors in a run directory of their own, and train its base stage on one domain."""
    with tempfile.TemporaryDirectory(prefix="warm-base-") as directory:
        run = RunDirectory.create(directory, None, recipe)
        with working(recipe, run) as (work, initial):
            assert recipe.stages.base is not None
            yield work, run_sft(work, "base", recipe.stages.base, [domain], initial)


@contextmanager
def working(recipe: Recipe, run: RunDirectory) -> Iterator[tuple[Work, Path]]:
    """Start the actors of a run, without live view and report; its work and the initial checkpoint."""
    domains, tokenizer = load_domains(recipe), tokenizer_for(recipe, run)
    initial = initial_checkpoint(recipe, run, tokenizer)
    describe_engine(recipe, initial, run.path / "engine")
    with start_cluster(recipe, run.path / "engine", run.path) as cluster:
        yield Work(recipe, run, domains, tokenizer, cluster), initial
