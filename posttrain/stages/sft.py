"""Supervised fine-tuning: the base on all domains, an expert on its own."""

from __future__ import annotations

from pathlib import Path
from random import Random

from posttrain.data import Problem
from posttrain.data.efforts import in_shares, with_reasoning
from posttrain.data.rows import sft_rows
from posttrain.recipe.schema import SftStage
from posttrain.stages.work import Work
from posttrain.trainers.jobs import SftJob


def run_sft(work: Work, name: str, config: SftStage, domains: list[str], start: Path, slot: int = 0) -> Path:
    """Train on the reference answers of `domains` in equal parts, and return the checkpoint."""

    def job(output: str) -> SftJob:
        rows = sft_rows(work.tokenizer, draw_examples(work, name, domains, config.steps * config.batch_size))
        return SftJob(stage=name, config=config, checkpoint=str(start), output=output, rows=rows)

    return work.stage(name, config.steps, lambda output: work.cluster.trainers[slot].sft.remote(job(output)))


def draw_examples(work: Work, stage: str, domains: list[str], count: int) -> list[Problem]:
    """`count` training problems, the domains in turn, each problem as seldom as possible, modes in their shares."""
    order = Random(f"{work.recipe.seed}/{stage}")
    drawn: list[list[Problem]] = []
    for domain in domains:
        share = -(-count // len(domains))
        train = work.domains[domain].train
        picked: list[Problem] = []
        while len(picked) < share:
            picked += order.sample(train, min(len(train), share - len(picked)))
        config = work.recipe.domains[domain]
        drawn.append(with_reasoning(in_shares(picked, config.modes), config))
    return [problem for group in zip(*drawn, strict=True) for problem in group][:count]
