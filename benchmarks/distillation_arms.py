"""What the comparison of ways to make one student of several experts compares: every arm gives a checkpoint.

All begin with the same base and experts, and every arm that samples takes as many samples as the recipe's student:
from the student itself (distillation, GRPO) or from the experts (SFT). Prompts are the same, in the same shares.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.observe.metrics import read_metrics
from posttrain.recipe.evaluation import HoldoutEvaluation
from posttrain.recipe.stages import GrpoStage, OpdStage, OptimizerConfig, WarmStart
from posttrain.stages.evaluate import evaluate, measure
from posttrain.stages.grpo import draw, prompts_of
from posttrain.stages.merge import merge
from posttrain.stages.opd import opd_job
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.serving import Served
from posttrain.stages.warm_start import expert_rows
from posttrain.stages.work import Work, wait
from posttrain.trainers.generation import derive_seed
from posttrain.trainers.jobs import GrpoJob, SftJob
from posttrain.trainers.mixing import OrderedByTeacher

STAGE = "student"
"""The stage that every arm stands for: random numbers and prompts go by its name."""
SCALES = (0.4, 0.7, 1.0)
"""Of task arithmetic: the best on the selection problems is taken."""
COMPARED = 512
"""Samples by which a finished student is compared with the experts."""


@dataclass
class Comparison:
    """One seed: base, experts, and the actors to train with."""

    work: Work
    base: Path
    experts: dict[str, Path]
    notes: dict[str, Any] = field(default_factory=dict)
    """What the arm that runs has to say of itself."""

    @property
    def student(self) -> OpdStage:
        """The recipe's."""
        config = self.work.recipe.stages.student
        assert config is not None
        return config

    @property
    def samples(self) -> int:
        """What every arm may sample."""
        return self.student.steps * self.student.batch_size

    def output(self, arm: str) -> Path:
        """Where an arm's checkpoint belongs; nothing lies there any more, and nothing is known of what did."""
        path, measured = self.work.run.checkpoint_path(f"arm/{arm}"), self.work.measured
        shutil.rmtree(path, ignore_errors=True)
        for key in [key for key in measured if key[0] == str(path)]:
            del measured[key]
        return path

    def run(self, arm: str) -> dict[str, Any]:
        """Train an arm and measure what came of it."""
        self.notes, began, started = {}, time.time(), time.monotonic()
        self.work.cluster.client().forget_under(f"{STAGE}/")
        path = ARMS[arm](self, arm)
        seconds = time.monotonic() - started
        lines = [one for one in read_metrics(self.work.run.path / "metrics.jsonl") if "step" in one]
        return {
            "arm": arm,
            "seconds": seconds,
            **self.notes,
            "steps": [step(one, began) for one in lines if one["time"] > began],
            "accuracy": self.accuracy(f"{STAGE}/{arm}", path),
            **self.distance(path),
        }

    def accuracy(self, model: str, path: Path) -> dict[str, dict[str, Any]]:
        """By domain on held-out problems: pass@1, its interval, the answers' length."""
        evaluate(self.work, model, path)
        keys = ("pass@1", "ci95", "n", "mean_length")
        return {
            one["domain"]: {key: one[key] for key in keys}
            for one in read_metrics(self.work.run.path / "metrics.jsonl")
            if one.get("event") == "evaluated" and one["split"] == "holdout" and one["checkpoint"] == str(path)
        }

    def distance(self, path: Path) -> dict[str, dict[str, float]]:
        """The student's reverse KL to each expert and their agreement, on the student's own samples: what a step of
        distillation reports that changes nothing."""
        still = OptimizerConfig(lr=1e-12)
        config = OpdStage(steps=1, batch_size=COMPARED, optimizer=still, hidden_dtype=self.student.hidden_dtype)
        began = time.time()
        self.distil(config, path, self.output("distance"))
        (line,) = [
            one
            for one in read_metrics(self.work.run.path / "metrics.jsonl")
            if one.get("time", 0) > began and "step" in one
        ]
        return {
            name: {domain: line["metrics"][f"{metric}/{domain}"] for domain in self.experts}
            for name, metric in (("reverse_kl", "kl"), ("top1_agreement", "top1_agreement"), ("entropy", "entropy"))
        }

    def distil(self, config: OpdStage, start: Path, output: Path) -> Path:
        """One stage of on-policy distillation."""
        cluster, client = self.work.cluster, self.work.cluster.client()
        client.forget_under(f"{STAGE}/")
        job = opd_job(self.work, STAGE, config, start, self.experts, str(output))
        wait(cluster.trainers[0].opd.remote(job, client, cluster.teachers()), self.work.run.log_path)
        return output


def step(record: dict[str, Any], began: float) -> dict[str, float]:
    """What the curves show of one step."""
    metrics = record["metrics"]
    shown = {key: metrics[key] for key in ("kl", "reverse_kl", "reward", "completion_length", "entropy", "loss")
             if metrics.get(key) is not None}  # fmt: skip
    return {"step": record["step"], "steps": record["steps"], "seconds": record["time"] - began, **shown}


Arm = Callable[[Comparison, str], Path]


def distilled(**options: Any) -> Arm:
    """The recipe's student with other options."""

    def arm(comparison: Comparison, name: str) -> Path:
        config = OpdStage.model_validate(comparison.student.model_dump(exclude_unset=True) | options)
        comparison.notes["samples"] = comparison.samples
        return comparison.distil(config, comparison.base, comparison.output(name))

    return arm


def slower(factor: float, **options: Any) -> Arm:
    """As `distilled`, at a fraction of the student's rates."""

    def arm(comparison: Comparison, name: str) -> Path:
        rates = comparison.student.optimizer.model_dump(exclude_unset=True)
        rates |= {key: rates[key] * factor for key in ("lr", "adamw_lr") if key in rates}
        return distilled(optimizer=rates, **options)(comparison, name)

    return arm


def expert_outputs(comparison: Comparison, name: str) -> Path:
    """SFT on the experts' answers to the prompts that the student would have been asked, with its optimizer."""
    work, student = comparison.work, comparison.student
    config = WarmStart(
        steps=student.steps,
        batch_size=student.batch_size,
        max_length=work.recipe.rollout.max_model_len,
        temperature=student.temperature,
        optimizer=student.optimizer,
    )
    rows = expert_rows(work, STAGE, student, config, comparison.experts)
    comparison.notes |= {"samples": comparison.samples, "learned": len(rows)}
    output = comparison.output(name)
    job = SftJob(stage=STAGE, config=config, checkpoint=str(comparison.base), output=str(output), rows=rows)
    wait(work.cluster.trainers[0].sft.remote(job), work.run.log_path)
    return output


def mixed_grpo(comparison: Comparison, name: str) -> Path:
    """One actor learns all domains from the base, in one GRPO stage with the settings of the experts'."""
    work = comparison.work
    original = next(stage for stage in work.recipe.stages.experts.per_domain if isinstance(stage, GrpoStage))
    steps = max(1, comparison.samples // (original.prompts_per_step * original.group_size))
    config = original.model_copy(update={"steps": steps})
    count = config.steps * config.prompts_per_step
    problems = {domain: draw(work, STAGE, domain, count) for domain in comparison.experts}
    everything = [problem for group in problems.values() for problem in group]
    shares = {domain: comparison.student.shares.get(domain, 1.0) for domain in problems}
    prompts = {domain: prompts_of(work, group) for domain, group in problems.items()}
    seed = derive_seed(work.recipe.seed, STAGE)
    output, client = comparison.output(name), work.cluster.client()
    job = GrpoJob(
        stage=STAGE,
        config=config,
        checkpoint=str(comparison.base),
        output=str(output),
        prompts=list(OrderedByTeacher(prompts, lambda: shares, steps, config.prompts_per_step, seed)),
        max_new_tokens=max(work.recipe.domains[domain].longest_completion for domain in problems),
        reward=DomainRewards(work.recipe, str(work.run.tokenizer_path), everything),
        rollout=work.recipe.rollout,
    )
    wait(work.cluster.trainers[0].grpo.remote(job, client), work.run.log_path)
    comparison.notes["samples"] = count * config.group_size
    return output


def average(comparison: Comparison, name: str) -> Path:
    """The mean of the experts' weights."""
    return _merged(comparison, name, 1 / len(comparison.experts))


def task_arithmetic(comparison: Comparison, name: str) -> Path:
    """The base and the sum of what each expert changed, times the scale that is best on the selection problems."""
    work, found = comparison.work, {}
    for scale in SCALES:
        path = _merged(comparison, f"{name}-{scale:g}", scale)
        served, model = Served(work, path), f"{STAGE}/{name}-{scale:g}"
        found[scale] = fmean(
            measure(served, model, domain, "selection", _selection(work, domain)) for domain in comparison.experts
        )
    best = max(found, key=lambda scale: found[scale])
    comparison.notes |= {"scale": best, "selection": {f"{scale:g}": value for scale, value in found.items()}}
    return work.run.checkpoint_path(f"arm/{name}-{best:g}")


def _selection(work: Work, domain: str) -> HoldoutEvaluation:
    return HoldoutEvaluation(n=len(work.domains[domain].selection))


def _merged(comparison: Comparison, name: str, scale: float) -> Path:
    output, family = comparison.output(name), comparison.work.recipe.model.family
    merge(family, comparison.base, list(comparison.experts.values()), scale, output)
    comparison.notes["samples"] = 0
    return output


ARMS: dict[str, Arm] = {
    "reverse_kl": distilled(),
    "sampled_token": distilled(divergence="sampled_token"),
    "sampled_token_slow": slower(0.25, divergence="sampled_token"),
    "top_8": distilled(top_k=8),
    "top_32": distilled(top_k=32),
    "forward_kl": distilled(divergence="forward_kl"),
    "expert_outputs": expert_outputs,
    "mixed_grpo": mixed_grpo,
    "average": average,
    "task_arithmetic": task_arithmetic,
    "fixed_negative": distilled(divergence="fixed_negative"),
}
