"""How good a judge a model is: agreement with held-out labels, consistency under swapped positions, self-preference."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from posttrain.data import DomainData, Problem
from posttrain.data.efforts import in_effort, split_completion
from posttrain.data.encoding import decode_completion, encode_prompt
from posttrain.data.judging import VERDICTS, judging_problem
from posttrain.data.problems import prompt_text
from posttrain.files import atomic_write
from posttrain.observe.intervals import Z95, binomial_interval
from posttrain.recipe import Recipe
from posttrain.stages.judging import Judge
from rewards import Scorer, build
from rollouts.types import Sampling

if TYPE_CHECKING:
    from posttrain.stages.hooks import EvaluatedModel

Verdicts = Sequence[str | None]
"""One for each judging problem; None where none could be read."""


def evaluate_judges(
    model: EvaluatedModel, recipe: Recipe, domains: dict[str, DomainData], n: int, directory: Path
) -> dict[str, float]:
    """The numbers of `docs/judge.md` for every judge domain, `<domain>/<number>`; verdicts are the likeliest ones.

    Args:
        directory: where the base leaves its answers, with which later models' own are compared.
    """
    found: dict[str, float] = {}
    for name, config in recipe.domains.items():
        judging = config.judging
        if judging is None:
            continue
        judge = Judge(recipe, name, model.tokenizer, model.client)
        problems = domains[name].holdout[:n]
        verdicts = ask(judge, problems)
        numbers = agreement(problems, verdicts)
        if judging.form == "pair":
            numbers |= position_consistency(problems, verdicts)
        elif judging.domain is not None:
            judged = domains[judging.domain].holdout[:n]
            numbers |= _self_preference(model, recipe, judge, judging.domain, judged, directory / f"{name}.json")
        found |= {f"{name}/{key}": value for key, value in numbers.items()}
    return found


def ask(judge: Judge, problems: Sequence[Problem]) -> list[str | None]:
    """The likeliest verdict on each problem."""
    return [None if isinstance(found, Exception) else found[0] for found in judge.verdicts(problems)]


def agreement(problems: Sequence[Problem], verdicts: Verdicts) -> dict[str, float]:
    """Share of the verdicts that are the label, in all and label by label (that of B is not named: A's says it all).

    Of single answers, `yes_if_right` and `yes_if_wrong` tell a judge that says yes to everything from a good one.
    """
    pairs = list(zip(verdicts, (problem.answer for problem in problems), strict=True))
    agreed = sum(verdict == label for verdict, label in pairs)
    found = {
        "agreement": agreed / len(pairs),
        **_bounds("agreement", binomial_interval(agreed, len(pairs))),
        "unreadable": sum(verdict is None for verdict, _ in pairs) / len(pairs),
    }
    yes, no = VERDICTS["single"]
    for label, name in ((yes, "yes_if_right"), (no, "yes_if_wrong")):
        said = [verdict == yes for verdict, one in pairs if one == label]
        if said:
            found[name] = fmean(said)
    return found


def position_consistency(problems: Sequence[Problem], verdicts: Verdicts) -> dict[str, float]:
    """Share of the pairs of which both orders get the same answer preferred, and how often the first one is."""
    first, second = VERDICTS["pair"]
    by_pair: dict[str, list[str | None]] = {}
    for problem, verdict in zip(problems, verdicts, strict=True):
        by_pair.setdefault(problem.entry["pair"], []).append(verdict)
    both = [said for said in by_pair.values() if len(said) == 2]
    consistent = sum(set(said) == {first, second} for said in both)
    found = {"first_chosen": fmean(verdict == first for verdict in verdicts)}
    if both:
        found |= {
            "position_consistency": consistent / len(both),
            **_bounds("position_consistency", binomial_interval(consistent, len(both))),
        }
    return found


def self_preference(own: Sequence[tuple[bool, bool]], other: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """How much more often a judge says yes to its own answers than to another model's, right or wrong alike.

    Args:
        own: of each answer of the judge's, whether it is right, and whether the judge says so.
        other: the same of the other model's answers.

    Returns:
        The share of yes for each model and label; and `self_preference`, the mean over the labels of own minus other,
        with its 95 % interval (normal), if both models have answers of a label.
    """
    found: dict[str, float] = {}
    gaps, variance = [], 0.0
    for right, label in ((True, "right"), (False, "wrong")):
        shares = []
        for whose, answers in (("own", own), ("base", other)):
            said = [yes for is_right, yes in answers if is_right == right]
            if said:
                share = found[f"yes_if_{whose}_{label}"] = fmean(said)
                shares.append((share, share * (1 - share) / len(said)))
        if len(shares) == 2:
            gaps.append(shares[0][0] - shares[1][0])
            variance += shares[0][1] + shares[1][1]
    if gaps:
        gap, half = fmean(gaps), Z95 * math.sqrt(variance) / len(gaps)
        found |= {"self_preference": gap, **_bounds("self_preference", (gap - half, gap + half))}
    return found


def _self_preference(
    model: EvaluatedModel, recipe: Recipe, judge: Judge, domain: str, problems: Sequence[Problem], answers: Path
) -> dict[str, float]:
    """Of a judge domain; nothing for the base itself, and where nothing but the judge says what is right."""
    config = recipe.domains[domain]
    labels = build(config.reward[:1], f"domains.{domain}.reward")
    if config.environment is not None or labels.parts[0].awaits_actor:
        return {}
    own = _answers(model, recipe, domain, problems)
    if model.name == "base":
        answers.parent.mkdir(exist_ok=True)
        atomic_write(answers, json.dumps(own))
    if model.name == "base" or not answers.exists():
        return {}
    other = json.loads(answers.read_text())
    return self_preference(*(_judged(judge, labels, problems, texts) for texts in (own, other)))


def _answers(model: EvaluatedModel, recipe: Recipe, domain: str, problems: Sequence[Problem]) -> list[str]:
    """The model's answers, sampled at temperature 1 with the same random numbers for every model."""
    config = recipe.domains[domain]
    effort = config.efforts[0]
    posed = [in_effort(problem, effort, config.modes[effort]) if effort else problem for problem in problems]
    prompts = [list(encode_prompt(model.tokenizer, problem.messages, problem.mode)) for problem in posed]
    groups = model.client.generate(prompts, Sampling(config.new_tokens(effort)))
    return [
        decode_completion(model.tokenizer, split_completion(model.tokenizer, group[0].token_ids, problem.mode)[1])
        for problem, group in zip(posed, groups, strict=True)
    ]


def _judged(judge: Judge, labels: Scorer, problems: Sequence[Problem], texts: Sequence[str]) -> list[tuple[bool, bool]]:
    """Of each answer whether it is right, and whether the judge says yes; answers without a verdict are left out."""
    posed = [
        judging_problem(judge.domain, judge.judging, judge.config.system, prompt_text(problem.messages), [text], "")
        for problem, text in zip(problems, texts, strict=True)
    ]
    right = [labels.score(problem, text, [], "stop").correct for problem, text in zip(problems, texts, strict=True)]
    said = ask(judge, posed)
    return [(one, verdict == "yes") for one, verdict in zip(right, said, strict=True) if verdict is not None]


def _bounds(name: str, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}
