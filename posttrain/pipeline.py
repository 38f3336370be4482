"""The whole of a run on one page: base, then an expert for each domain, then one student taught by all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from posttrain.errors import RunFailed
from posttrain.evaluation import evaluate_checkpoint
from posttrain.observe.status import final_table
from posttrain.recipe import Recipe
from posttrain.recipe.schema import WARM_START
from posttrain.recipe.stages import SftStage
from posttrain.rundir import RunDirectory
from posttrain.session import session
from posttrain.stages.evaluate import evaluate, passes_gate
from posttrain.stages.grpo import run_grpo
from posttrain.stages.merge import student_start
from posttrain.stages.opd import run_opd
from posttrain.stages.origin import Changed
from posttrain.stages.sft import run_sft
from posttrain.stages.side_by_side import side_by_side
from posttrain.stages.warm_start import run_warm_start
from posttrain.stages.work import Work
from posttrain.watchdog import going_on

__all__ = ["evaluate_checkpoint", "resume", "run"]


def run(recipe: Recipe, run_directory: RunDirectory, changed: Changed = "refuse") -> int:
    """Run a recipe from its first unfinished stage to the report, and print what came of it; returns the exit code."""

    def go() -> None:
        with session(recipe, run_directory, changed) as (work, initial):
            drive(work, initial)

    going_on(go)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(final_table(json.loads((run_directory.path / "report.json").read_text())))
    return 0


def resume(run_directory: RunDirectory, recipe: Recipe | None = None, changed: Changed = "refuse") -> int:
    """Go on with a run, or with another recipe for it; finished stages whose inputs are the same are not run again."""
    return run(recipe or run_directory.recipe, run_directory, changed)


def drive(work: Work, initial: Path) -> None:
    """V4's two steps (report §5.1): experts apart, then on-policy distillation into one."""
    base = train_base(work, initial)
    experts = grow_experts(work, base)
    if work.recipe.stages.student is not None:
        work.cluster.keep_first_trainer()
        distil(work, base, experts)


def train_base(work: Work, initial: Path) -> Path:
    """One model of all domains that every expert and the student start from."""
    config = work.recipe.stages.base
    base = initial if config is None else run_sft(work, "base", config, list(work.domains), initial)
    evaluate(work, "base", base)
    return base


def grow_experts(work: Work, base: Path) -> dict[str, Path]:
    """As many experts side by side as the cluster has slots; those that a gate drops are not returned."""
    grown = side_by_side(
        names=work.recipe.experts,
        do=lambda domain, slot: grow_expert(work, domain, base, slot),
        slots=work.cluster.slots,
        ending=work.ending,
        interrupt=work.interrupt,
    )
    return {domain: path for domain, path in grown.items() if path is not None}


def grow_expert(work: Work, domain: str, base: Path, slot: int) -> Path | None:
    """The expert's stages in order, each evaluated; then its gate. None for an expert that its gate drops."""
    model, name, domains = base, "base", work.recipe.learned_by(domain)
    for config in work.recipe.expert_stages(domain):
        name = f"expert/{domain}/{config.kind}"
        if isinstance(config, SftStage):
            model = run_sft(work, name, config, domains, model, slot)
        else:
            model = run_grpo(work, name, config, domains, model, slot)
        evaluate(work, name, model, slot)
    gate = work.recipe.stages.experts.gate
    if passes_gate(work, gate, domain, name, base, model, slot) or gate.action == "warn":
        return model
    reason = f"gate: not {gate.min_gain} better than the base on the selection problems"
    if gate.action == "stop":
        raise RunFailed(f"{name}: {reason} (stages.experts.gate)")
    work.run.drop_stage(name, reason)
    return None


def distil(work: Work, base: Path, experts: dict[str, Path]) -> Path:
    """The student samples, its experts teach (report eq. 29)."""
    if work.recipe.experts and not experts:
        raise RunFailed("no expert passed its gate: there is nothing to distil")
    config = work.recipe.stages.student
    assert config is not None
    start = student_start(work, config, base, experts)
    if config.warm_start is not None:
        start = run_warm_start(work, WARM_START, config, start, experts)
        evaluate(work, WARM_START, start)
    student = run_opd(work, "student", config, start, experts)
    evaluate(work, "student", student)
    return student
