"""Accuracy of a checkpoint on held-out problems, sampled by the rollout workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from posttrain.data import Problem
from posttrain.data.encoding import encode_prompt, render_prompt
from posttrain.observe.intervals import accuracy_interval
from posttrain.recipe.schema import GateConfig, HoldoutEvaluation
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.work import Work
from rollouts.types import Completion, Sampling

TRANSCRIPTS = 3
"""Samples of each model and domain that go into the report."""


def evaluate(work: Work, model: str, checkpoint: Path, slot: int | None = None) -> dict[str, float]:
    """Run the recipe's held-out evaluations of a model on every domain; returns pass@1 by domain."""
    accuracy: dict[str, float] = {}
    for hook in work.recipe.evaluation:
        for domain in work.domains:
            accuracy[domain] = measure(work, model, checkpoint, domain, "holdout", hook.holdout, slot)
    return accuracy


def passes_gate(
    work: Work, gate: GateConfig, domain: str, model: str, parent: Path, child: Path, slot: int | None = None
) -> bool:
    """Whether the expert beats its parent on selection problems by the gate's margin."""
    config = HoldoutEvaluation(n=len(work.domains[domain].selection))
    before, after = (measure(work, model, path, domain, "selection", config, slot) for path in (parent, child))
    passed = after - before >= gate.min_gain
    work.run.append_event(
        {"event": "gate", "stage": model, "domain": domain, "metric": gate.metric, "parent": before,
         "value": after, "gain": after - before, "min_gain": gate.min_gain, "passed": passed, "action": gate.action}
    )  # fmt: skip
    return passed


def measure(
    work: Work,
    model: str,
    checkpoint: Path,
    domain: str,
    split: Literal["holdout", "selection"],
    config: HoldoutEvaluation,
    slot: int | None = None,
) -> float:
    """pass@1 of a checkpoint on one domain; measured once for each checkpoint, also over resumed runs."""
    key = (str(checkpoint), domain, split, f"n={config.n} samples={config.samples} temperature={config.temperature}")
    if key in work.measured:
        return work.measured[key]
    started = time.monotonic()
    problems = getattr(work.domains[domain], split)[: config.n]
    completions = _sample(work, checkpoint, domain, problems, config, slot)
    rewards = DomainRewards(work.recipe, str(work.run.tokenizer_path), problems)
    shares, lengths = [], []
    for problem, answers in zip(problems, completions, strict=True):
        judged = [rewards.judge(problem.id, answer.token_ids, answer.finish_reason) for answer in answers]
        shares.append(sum(result.correct for _, result in judged) / len(answers))
        lengths += [len(answer.token_ids) for answer in answers]
        if split == "holdout" and len(shares) <= TRANSCRIPTS:
            _record_sample(work, model, domain, problem, answers[0], judged[0][0], judged[0][1].correct)
    value = sum(shares) / len(shares)
    work.run.append_event(
        {"event": "evaluated", "stage": model, "model": model, "checkpoint": str(checkpoint), "domain": domain,
         "split": split, "sampling": key[-1], "pass@1": value, "n": len(problems), "samples": config.samples,
         "ci95": list(accuracy_interval(shares, config.samples)), "mean_length": sum(lengths) / len(lengths),
         "tokens": sum(lengths), "seconds": time.monotonic() - started}
    )  # fmt: skip
    work.measured[key] = value
    return value


def _sample(
    work: Work, checkpoint: Path, domain: str, problems: list[Problem], config: HoldoutEvaluation, slot: int | None
) -> list[list[Completion]]:
    """Answers of a checkpoint, with the same random numbers for every model: differences are not those of luck."""
    client = work.cluster.client(slot)
    client.load_checkpoint(checkpoint, (client.weight_version() or 0) + 1)
    sampling = Sampling(
        max_tokens=work.recipe.domains[domain].max_new_tokens,
        temperature=config.temperature,
        n=config.samples,
        seed=0,
    )
    return client.generate([encode_prompt(work.tokenizer, problem.messages) for problem in problems], sampling)


def _record_sample(
    work: Work, model: str, domain: str, problem: Problem, answer: Completion, text: str, correct: bool
) -> None:
    ended = "" if answer.finish_reason == "stop" else " [cut off]"
    work.run.append_event(
        {"event": "sample", "model": model, "domain": domain, "prompt": render_prompt(problem.messages),
         "completion": text + ended, "reference": problem.answer, "correct": correct}
    )  # fmt: skip
