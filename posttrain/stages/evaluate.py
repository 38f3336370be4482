"""Accuracy of a checkpoint on held-out problems, sampled by the rollout workers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data import Problem
from posttrain.data.efforts import in_every_effort
from posttrain.data.encoding import encode_prompt, render_prompt
from posttrain.observe.intervals import accuracy_interval
from posttrain.recipe import Recipe
from posttrain.recipe.domains import Effort
from posttrain.recipe.evaluation import HoldoutEvaluation
from posttrain.recipe.stages import GateConfig
from posttrain.stages.episodes import episodes_of
from posttrain.stages.hooks import run_hooks
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.serving import Served
from rollouts.environments import EpisodeClient
from rollouts.types import Completion, Sampling, episode_means

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.stages.work import Work
    from rollouts.pool import RolloutClient

TRANSCRIPTS = 3
"""Samples of each model and domain that go into the report."""


@dataclass(frozen=True)
class Measurement:
    """A checkpoint's answers to problems of one domain, judged."""

    accuracy: float
    """pass@1: the mean over the problems of the share of right answers."""
    interval: tuple[float, float]
    """95 %."""
    tokens: int
    mean_length: float
    """Tokens of an answer."""
    reward_errors: int
    """Answers that a reward failed on. They count as wrong."""
    truncated: float
    """Share of the answers that were cut off."""
    seconds: float
    transcripts: list[tuple[Problem, str, bool]]
    """Problem, answer, whether it is right."""
    shares: list[float]
    """For each problem the share of right answers."""
    modes: dict[str, Measurement] = field(default_factory=dict)
    """The same in each of the domain's modes; the whole then is over all of them, each as important as the others."""
    episodes: dict[str, float] = field(default_factory=dict)
    """With an environment: turns, tool calls, tool errors and environment's tokens of an episode, on average."""

    def by_mode(self) -> dict[str, dict[str, Any]]:
        """Of each mode what the report says."""
        return {
            effort: {"pass@1": one.accuracy, "ci95": list(one.interval), "n": len(one.shares),
                     "mean_length": one.mean_length, "truncated": one.truncated}
            for effort, one in self.modes.items()
        }  # fmt: skip


def evaluate(work: Work, model: str, checkpoint: Path, slot: int | None = None) -> dict[str, float]:
    """Run the recipe's evaluations of a model; returns pass@1 by domain."""
    accuracy: dict[str, float] = {}
    served = Served(work, checkpoint, slot)
    for hook in work.recipe.evaluation:
        if hook.holdout is not None and hook.wants(model):
            for domain in hook.holdout.domains_of(model, work.domains):
                accuracy[domain] = measure(served, model, domain, "holdout", hook.holdout)
    run_hooks(served, model)
    return accuracy


def passes_gate(
    work: Work, gate: GateConfig, domain: str, model: str, parent: Path, child: Path, slot: int | None = None
) -> bool:
    """Whether the expert beats its parent on selection problems by the gate's margin; decided once in a run."""
    if model in work.gates:
        return work.gates[model]
    config = HoldoutEvaluation(n=len(work.domains[domain].selection))
    before, after = (measure(Served(work, path, slot), model, domain, "selection", config) for path in (parent, child))
    passed = after - before >= gate.min_gain
    work.run.append_event(
        {"event": "gate", "stage": model, "domain": domain, "metric": gate.metric, "parent": before,
         "value": after, "gain": after - before, "min_gain": gate.min_gain, "passed": passed, "action": gate.action}
    )  # fmt: skip
    work.gates[model] = passed
    return passed


def measure(
    served: Served, model: str, domain: str, split: Literal["holdout", "selection"], config: HoldoutEvaluation
) -> float:
    """pass@1 of a checkpoint on one domain; measured once for each checkpoint, also over resumed runs."""
    work, checkpoint = served.work, served.checkpoint
    key = (str(checkpoint), domain, split, f"n={config.n} samples={config.samples} temperature={config.temperature}")
    if key in work.measured:
        return work.measured[key]
    work.require_going_on()
    distinct = getattr(work.domains[domain], split)[: config.n]
    problems = in_every_effort(distinct, work.recipe.domains[domain].modes)
    rewards = DomainRewards(work.recipe, str(work.run.tokenizer_path), problems, model, work.run.metrics)
    found = measure_problems(work.recipe, served.client, work.tokenizer, problems, rewards, config)
    if split == "holdout":
        _record_transcripts(work, model, found)
    work.run.append_event(
        {"event": "evaluated", "stage": model, "model": model, "checkpoint": str(checkpoint), "domain": domain,
         "split": split, "sampling": key[-1], "pass@1": found.accuracy, "n": len(distinct), "samples": config.samples,
         "ci95": list(found.interval), "mean_length": found.mean_length, "tokens": found.tokens,
         "reward_errors": found.reward_errors, "seconds": found.seconds, **found.episodes,
         **({"modes": found.by_mode()} if found.modes else {})}
    )  # fmt: skip
    work.measured[key] = found.accuracy
    return found.accuracy


def measure_problems(
    recipe: Recipe,
    client: RolloutClient,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rewards: DomainRewards,
    config: HoldoutEvaluation,
) -> Measurement:
    """Answers of the engines' present weights to problems of one domain, in all of its modes or without any.

    The random numbers are the same for every model, so that differences are not those of luck.
    """
    by_effort: dict[Effort | None, list[Problem]] = {}
    for problem in problems:
        by_effort.setdefault(problem.effort, []).append(problem)
    found = {
        effort: _measure_mode(recipe, client, tokenizer, asked, rewards, config) for effort, asked in by_effort.items()
    }
    modes: dict[str, Measurement] = {effort: one for effort, one in found.items() if effort is not None}
    return _over_modes(modes, config.samples) if modes else found[None]


def _over_modes(modes: Mapping[str, Measurement], samples: int) -> Measurement:
    """All modes as one measurement: the same problems, answered once in each."""
    parts = list(modes.values())
    shares = [fmean(shares) for shares in zip(*(one.shares for one in parts), strict=True)]
    return Measurement(
        accuracy=fmean(shares),
        interval=accuracy_interval(shares, samples * len(parts)),
        tokens=sum(one.tokens for one in parts),
        mean_length=fmean(one.mean_length for one in parts),
        reward_errors=sum(one.reward_errors for one in parts),
        truncated=fmean(one.truncated for one in parts),
        seconds=sum(one.seconds for one in parts),
        transcripts=[transcript for one in parts for transcript in one.transcripts],
        shares=shares,
        modes=dict(modes),
        episodes={name: fmean(one.episodes[name] for one in parts) for name in parts[0].episodes},
    )


def _measure_mode(
    recipe: Recipe,
    client: RolloutClient,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rewards: DomainRewards,
    config: HoldoutEvaluation,
) -> Measurement:
    """Answers to problems of one domain that are asked in one mode."""
    started = time.monotonic()
    sampling = Sampling(
        max_tokens=recipe.domains[problems[0].domain].new_tokens(problems[0].effort),
        temperature=config.temperature,
        n=config.samples,
        seed=0,
    )
    episodes = episodes_of(recipe, rewards.tokenizer_path, problems)
    answers: list[list[Completion]]
    if episodes is not None:
        answers = EpisodeClient(client, episodes).play([problem.id for problem in problems], sampling)
    else:
        prompts = [encode_prompt(tokenizer, problem.messages, problem.mode) for problem in problems]
        answers = client.generate(prompts, sampling)
    rewards.ask_through(client)
    everything = [(problem.id, answer) for problem, group in zip(problems, answers, strict=True) for answer in group]
    verdicts = iter(
        rewards.judge_all(
            [problem_id for problem_id, _ in everything],
            [answer.sampled_ids for _, answer in everything],
            [answer.finish_reason for _, answer in everything],
        )
    )
    judged = [list(islice(verdicts, len(group))) for group in answers]
    shares = [sum(result.correct for _, result in group) / len(group) for group in judged]
    lengths = [len(answer.sampled_ids) for group in answers for answer in group]
    cut_off = [answer.finish_reason == "length" for group in answers for answer in group]
    return Measurement(
        accuracy=sum(shares) / len(shares),
        interval=accuracy_interval(shares, config.samples),
        tokens=sum(lengths),
        mean_length=sum(lengths) / len(lengths),
        reward_errors=sum(result.error is not None for group in judged for _, result in group),
        truncated=sum(cut_off) / len(cut_off),
        seconds=time.monotonic() - started,
        shares=shares,
        transcripts=[
            (problem, _transcript(tokenizer, group[0], text), result.correct)
            for problem, group, ((text, result), *_) in zip(problems, answers, judged, strict=True)
        ][:TRANSCRIPTS],
        episodes=episode_means([answer for group in answers for answer in group]),
    )


def _transcript(tokenizer: PreTrainedTokenizerBase, answer: Completion, text: str) -> str:
    """The answer; of an episode everything after its prompt."""
    if answer.episode is not None:
        text = tokenizer.decode(answer.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if answer.finish_reason == "stop" else f"{text} [cut off]"


def _record_transcripts(work: Work, model: str, found: Measurement) -> None:
    for problem, answer, correct in found.transcripts:
        work.run.append_event(
            {"event": "sample", "model": model, "domain": problem.domain,
             "prompt": render_prompt(problem.messages, problem.mode), "completion": answer, "reference": problem.answer,
             "correct": correct}
        )  # fmt: skip
