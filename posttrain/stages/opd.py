"""On-policy distillation of all experts into one student."""

from __future__ import annotations

from pathlib import Path

from posttrain.recipe.stages import OpdStage
from posttrain.stages.episodes import episodes_of
from posttrain.stages.grpo import draw, first_version, prompts_of
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.work import Work
from posttrain.trainers.jobs import OpdJob, SnapshotPlan, Teacher


def run_opd(work: Work, name: str, config: OpdStage, start: Path, experts: dict[str, Path]) -> Path:
    """The student samples on every domain; each sample is taught by its domain's expert. Returns the checkpoint."""

    cluster, client = work.cluster, work.cluster.client()
    return work.stage(
        name,
        config.steps,
        lambda *place: cluster.trainers[0].opd.remote(
            opd_job(work, name, config, start, experts, *place), client, cluster.teachers()
        ),
        client,
    )


def opd_job(
    work: Work,
    name: str,
    config: OpdStage,
    start: Path,
    experts: dict[str, Path],
    output: str,
    snapshots: SnapshotPlan | None = None,
) -> OpdJob:
    """What the trainer is asked to do."""
    teachers = teachers_by_domain(work, experts)
    problems = {domain: draw(work, name, domain, config.steps * config.batch_size) for domain in teachers}
    everything = [problem for group in problems.values() for problem in group]
    return OpdJob(
        stage=name,
        config=config,
        checkpoint=str(start),
        output=output,
        prompts={domain: prompts_of(work, group) for domain, group in problems.items()},
        teachers=teachers,
        max_new_tokens={domain: work.recipe.domains[domain].longest_completion for domain in teachers},
        reward=DomainRewards(work.recipe, str(work.run.tokenizer_path), everything, name, work.run.metrics),
        rollout=work.recipe.rollout,
        first_version=first_version(work, name),
        episodes=episodes_of(work.recipe, str(work.run.tokenizer_path), everything),
        snapshots=snapshots,
    )


def teachers_by_domain(work: Work, experts: dict[str, Path]) -> dict[str, list[Teacher]]:
    """Who teaches each domain, without the experts that their gates dropped; a domain without a teacher is left out."""
    found = {}
    for domain in work.recipe.domains:
        teachers = [
            Teacher(teacher.name, str(experts[teacher.expert]) if teacher.expert else str(teacher.checkpoint),
                    teacher.weight, teacher.expert is None, teacher.first_step, teacher.last_step)
            for teacher in work.recipe.teachers_of(domain)
            if teacher.expert is None or teacher.expert in experts
        ]  # fmt: skip
        if teachers:
            found[domain] = teachers
    return found
