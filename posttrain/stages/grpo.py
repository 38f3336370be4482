"""Reinforcement learning of one expert on the rewards of its domain, or of several domains jointly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

from posttrain.data import Problem
from posttrain.data.efforts import in_shares
from posttrain.data.encoding import encode_prompt
from posttrain.data.mixture import in_turn, share_of
from posttrain.recipe.stages import GrpoStage
from posttrain.stages.episodes import episodes_of, policy_messages
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.work import Work
from posttrain.trainers.jobs import GrpoJob, Prompt, SnapshotPlan

VERSION_BITS = 20
"""More weight versions than a stage has steps and evaluations."""


def prompts_of(work: Work, problems: list[Problem]) -> list[Prompt]:
    """Problems as the policy sees them."""
    domains = work.recipe.domains
    return [
        Prompt(
            problem.id,
            problem.domain,
            tuple(encode_prompt(work.tokenizer, policy_messages(work.recipe, problem), problem.mode)),
            effort=problem.effort,
            max_new_tokens=domains[problem.domain].new_tokens(problem.effort),
        )
        for problem in problems
    ]


def first_version(work: Work, stage: str) -> int:
    """The number that a stage's weight versions start above.

    It is the same in every life of a run: tokens that were sampled before a restart keep the versions they had.
    """
    return (1 + work.recipe.stage_names().index(stage)) << VERSION_BITS


def draw(work: Work, stage: str, domain: str, count: int) -> list[Problem]:
    """At most `count` training problems in an order of the stage's own, each at most once.

    With modes, in their shares, and each at most once for every mode, though by chance in the same mode again.
    """
    train, modes = work.domains[domain].train, work.recipe.domains[domain].modes
    order = Random(f"{work.recipe.seed}/{stage}/{domain}")
    drawn = order.sample(train, min(len(train), count))
    while len(drawn) < min(count, len(modes) * len(train)):
        drawn += order.sample(train, min(len(train), count - len(drawn)))
    return in_shares(drawn, modes)


def draw_from(work: Work, stage: str, domains: list[str], count: int, shares: Mapping[str, float]) -> list[Problem]:
    """As `draw`, of several domains in turn; what one of them has too few of comes again."""
    if len(domains) == 1:
        return draw(work, stage, domains[0], count)
    drawn = {domain: draw(work, stage, domain, share_of(domain, domains, shares, count)) for domain in domains}
    return in_turn(drawn, shares, count)


def run_grpo(work: Work, name: str, config: GrpoStage, domains: list[str], start: Path, slot: int = 0) -> Path:
    """Sample groups of answers, score them, learn from the differences; return the checkpoint.

    Args:
        domains: the expert's own first: the penalty's strength is that of this one.
    """
    config = config.for_domain(domains[0])

    def job(output: str, snapshots: SnapshotPlan | None) -> GrpoJob:
        problems = draw_from(work, name, domains, config.steps * config.prompts_per_step, config.shares)
        return GrpoJob(
            stage=name,
            config=config,
            checkpoint=str(start),
            output=output,
            prompts=prompts_of(work, problems),
            max_new_tokens=max(work.recipe.domains[domain].longest_completion for domain in domains),
            reward=DomainRewards(work.recipe, str(work.run.tokenizer_path), problems, name, work.run.metrics),
            rollout=work.recipe.rollout,
            first_version=first_version(work, name),
            episodes=episodes_of(work.recipe, str(work.run.tokenizer_path), problems),
            snapshots=snapshots,
        )

    trainer, client = work.cluster.trainers[slot], work.cluster.client(slot)
    return work.stage(name, config.steps, lambda *place: trainer.grpo.remote(job(*place), client), client)
