"""On-policy distillation of all experts into one student."""

from __future__ import annotations

from pathlib import Path

from posttrain.recipe.schema import OpdStage
from posttrain.stages.episodes import episodes_of
from posttrain.stages.grpo import draw, first_version, prompts_of
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.work import Work
from posttrain.trainers.jobs import OpdJob


def run_opd(work: Work, name: str, config: OpdStage, start: Path, experts: dict[str, Path]) -> Path:
    """The student samples on every domain; each sample is taught by its domain's expert. Returns the checkpoint."""

    def job(output: str) -> OpdJob:
        problems = {domain: draw(work, name, domain, config.steps * config.batch_size) for domain in experts}
        everything = [problem for group in problems.values() for problem in group]
        return OpdJob(
            stage=name,
            config=config,
            checkpoint=str(start),
            output=output,
            prompts={domain: prompts_of(work, group) for domain, group in problems.items()},
            teachers={domain: str(path) for domain, path in experts.items()},
            max_new_tokens={domain: work.recipe.domains[domain].longest_completion for domain in experts},
            reward=DomainRewards(work.recipe, str(work.run.tokenizer_path), everything, name, work.run.metrics),
            rollout=work.recipe.rollout,
            first_version=first_version(work, name),
            episodes=episodes_of(work.recipe, str(work.run.tokenizer_path), everything),
        )

    cluster, client = work.cluster, work.cluster.client()
    return work.stage(
        name,
        config.steps,
        lambda output: cluster.trainers[0].opd.remote(job(output), client, cluster.teachers()),
        client,
    )
