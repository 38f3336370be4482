"""`python -m benchmarks.distillation`: ways to make one student of several experts, at equal samples.

Base and experts of a recipe are trained once for each seed, in a run directory that is kept; then every arm begins with
them. What is there is not made again: the program may be stopped at any time, and be run in pieces (`--seeds`,
`--arms`, `--minutes`). Writes distillation.json and distillation.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.distillation_arms import ARMS, Comparison
from benchmarks.distillation_page import plot, show
from benchmarks.warm_base import working
from posttrain.errors import BadInput
from posttrain.files import atomic_write
from posttrain.observe.environment import describe_environment
from posttrain.pipeline import grow_experts, train_base
from posttrain.recipe import Recipe, load_recipe
from posttrain.rundir import RunDirectory

SIZES = (
    "stages.experts.per_domain[1].steps=20",
    "stages.experts.overrides.counting[1].steps=20",
    "stages.student.steps=128",
)
"""What is shorter than in the default recipe, so that an arm takes about a minute on two cores."""


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, print a table, draw a picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=None, help="default: recipes/tiny_v4.yaml with fewer steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further arm after so long")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/distillation"), help="directory of the results")
    arguments = parser.parse_args(given)
    try:
        results = compare(arguments)
    except BadInput as error:
        parser.error(str(error))
    show(results)
    plot(results, arguments.output / "distillation.png")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every arm with every seed; results that are there stay.

    Raises:
        BadInput: an arm that there is none of, or results of other settings in the directory.
    """
    arms, seeds = arguments.arms.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise BadInput(f"--arms: there is no {unknown[0]}; there are {', '.join(ARMS)}")
    changes = [] if arguments.recipe else list(SIZES)
    recipe_file = arguments.recipe or Path("recipes/tiny_v4.yaml")
    recipe = load_recipe(recipe_file, ["cluster.dashboard=false", *changes, *arguments.set])
    results = begun(arguments.output / "distillation.json", recipe)
    began = time.monotonic()
    for seed in seeds:
        done = {run["arm"] for run in results["runs"] if run["seed"] == seed}
        missing = [arm for arm in arms if arm not in done]
        if missing and time.monotonic() - began < 60 * arguments.minutes:
            run_seed(arguments, recipe.model_copy(update={"seed": seed}), missing, results, began)
    return results


def begun(file: Path, recipe: Recipe) -> dict[str, Any]:
    """The results so far.

    Raises:
        BadInput: they are of another recipe.
    """
    settings = recipe.model_dump(mode="json", exclude={"seed", "cluster"})
    if not file.is_file():
        empty = {"schema": 1, "recipe": settings, "environment": describe_environment(), "references": {}, "runs": []}
        atomic_write(file, json.dumps(empty, indent=1) + "\n")
    results: dict[str, Any] = json.loads(file.read_text())
    if results["recipe"] != settings:
        raise BadInput(f"{file} has results of other settings; give another --output, or take the directory away")
    return results


def run_seed(
    arguments: argparse.Namespace, recipe: Recipe, arms: Sequence[str], results: dict[str, Any], began: float
) -> None:
    """Base and experts unless they are there, then the arms, each written down as it ends."""
    seed, file = recipe.seed, arguments.output / "distillation.json"
    path = arguments.output / f"seed-{seed}"
    run = RunDirectory.open(path) if path.is_dir() else RunDirectory.create(arguments.output, path.name, recipe)
    with run, working(recipe, run) as (work, initial):
        base = train_base(work, initial)
        experts = grow_experts(work, base)
        work.cluster.keep_first_trainer()
        comparison = Comparison(work, base, experts)
        models = {"base": base, **experts}
        results["references"][str(seed)] = {
            "accuracy": {name: comparison.accuracy(name, at) for name, at in models.items()},
            "seconds": {name: run.stage(name).seconds for name in recipe.stage_names()},
            **comparison.distance(base),  # which also starts the teachers: no arm has to wait for that
        }
        atomic_write(file, json.dumps(results, indent=1) + "\n")
        for arm in arms:
            if time.monotonic() - began > 60 * arguments.minutes:
                return
            found = comparison.run(arm)
            results["runs"].append({"seed": seed, "rollout_workers": recipe.cluster.rollout_workers, **found})
            atomic_write(file, json.dumps(results, indent=1) + "\n")
            scores = ", ".join(f"{name} {100 * one['pass@1']:.1f} %" for name, one in found["accuracy"].items())
            print(f"seed {seed}, {arm}: {scores}, {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
