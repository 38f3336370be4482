"""What the recipe names: problems, rewards, tokenizer, weights, and whether engines would take them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data import DomainData, Problem, load_domains
from posttrain.doctor.verdicts import Verdict, tried
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WRONG_ANSWERS = 16
"""Answers to other problems that each domain's reward is tried on."""


@dataclass
class Inputs:
    """What the recipe names, read when it is first asked for."""

    recipe: Recipe
    run: RunDirectory
    """A scratch one."""
    domains: dict[str, DomainData] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from posttrain.stages.initial import tokenizer_for

        return tokenizer_for(self.recipe, self.run)

    @cached_property
    def initial(self) -> Path:
        from posttrain.stages.initial import initial_checkpoint

        return initial_checkpoint(self.recipe, self.run, self.tokenizer)


def look_at_inputs(inputs: Inputs) -> Iterator[Verdict]:
    """One verdict or more on each; those that need problems come only when there are problems."""
    yield from tried("problems", lambda: _problems(inputs))
    if inputs.domains:
        yield from tried("rewards", lambda: _rewards(inputs))
        yield from tried("lengths", lambda: _lengths(inputs))
    yield from tried("evaluations", lambda: _evaluations(inputs.recipe))
    yield from tried("weights", lambda: _weights(inputs))
    yield from tried("end of answers", lambda: _end_tokens(inputs))


def _problems(inputs: Inputs) -> Iterator[Verdict]:
    inputs.domains = load_domains(inputs.recipe)
    for name, data in inputs.domains.items():
        counts = (
            f"{len(data.train):,} to train on, {len(data.selection):,} to select on, {len(data.holdout):,} held out"
        )
        yield Verdict(f"problems of {name}", "ok", counts)


def _rewards(inputs: Inputs) -> Iterator[Verdict]:
    """Right for every reference answer that is tried, wrong for an empty one and for answers to other problems."""
    from posttrain.stages.scoring import check_rewards
    from rewards import build

    check_rewards(inputs.recipe, inputs.domains)
    for name, data in inputs.domains.items():
        scorer = build(inputs.recipe.domains[name].reward, f"domains.{name}.reward")
        if scorer.parts[0].awaits_actor:
            yield Verdict(f"reward of {name}", "skipped", "the model itself judges what is right")
            continue
        scorer = scorer.without_actor()
        pairs = _wrong_answers(data.holdout)
        accepted = [answer for problem, answer in pairs if scorer.score(problem, answer, [], "stop").correct]
        found = (
            f"the reference is right, an empty answer wrong, {len(pairs) - len(accepted)} of {len(pairs)} others wrong"
        )
        if pairs and len(accepted) == len(pairs):
            yield Verdict(
                f"reward of {name}",
                "failed",
                f"calls {accepted[0]!r} right, the answer to another problem, and {len(accepted) - 1} more",
                f"look at domains.{name}.reward: it accepts anything",
                bad_input=True,
            )
        else:
            remedy = "some may be right by chance: look at them" if accepted else ""
            yield Verdict(f"reward of {name}", "warning" if accepted else "ok", found, remedy)


def _wrong_answers(problems: list[Problem]) -> list[tuple[Problem, str]]:
    """Problems, each with the reference answer of another that has a different one."""
    pairs = []
    for problem, other in pairwise(problems):
        if problem.answer != other.answer:
            pairs.append((problem, other.answer))
    return pairs[:WRONG_ANSWERS]


def _lengths(inputs: Inputs) -> Verdict:
    from posttrain.session import check_data

    check_data(inputs.recipe, inputs.tokenizer, inputs.domains)
    found = f"every problem can be written, and fits rollout.max_model_len {inputs.recipe.rollout.max_model_len}"
    return Verdict("lengths", "ok", found)


def _evaluations(recipe: Recipe) -> Verdict:
    from posttrain.observe.trackers import check_trackers
    from posttrain.stages.hooks import check_hooks, named_hooks

    check_hooks(recipe)
    check_trackers(recipe)
    beside = "".join(f", {name}" for name in named_hooks(recipe))
    return Verdict("evaluations", "ok", f"{len(recipe.holdouts)} on held-out problems{beside}")


def _weights(inputs: Inputs) -> Verdict:
    """Readable, finite, and taken by the engines."""
    import torch

    from posttrain.session import describe_engine
    from posttrain.trainers.models import load_model

    model = load_model(inputs.recipe.model.family, inputs.initial)
    bad = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        return Verdict("weights", "failed", f"{len(bad)} tensors hold NaN or infinity, {bad[0]} first", "", True)
    describe_engine(inputs.recipe, inputs.initial, inputs.run.path / "engine")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Verdict("weights", "ok", f"{parameters:,} parameters, all finite; engines take the configuration")


def _end_tokens(inputs: Inputs) -> Verdict:
    """The token that ends what SFT teaches must be one that engines stop at."""
    from rollouts.settings import read_eos_token_ids

    taught = inputs.tokenizer.eos_token_id
    stops = read_eos_token_ids(inputs.run.path / "engine")
    of_model = json.loads((inputs.initial / "config.json").read_text()).get("eos_token_id")
    found = (
        f"the tokenizer ends answers with {taught}, engines stop at {stops}, the model's configuration says {of_model}"
    )
    if taught not in stops:
        remedy = "give the checkpoint and the tokenizer the same eos_token_id"
        return Verdict("end of answers", "failed", found, remedy, bad_input=True)
    return Verdict("end of answers", "ok", found)
