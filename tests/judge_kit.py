"""A recipe with judge domains, and a rollout client that answers their problems by a rule."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.data import Problem
from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.recipe import Recipe
from rollouts.types import Completion, FinishedGroup, GroupRequest, Sampling
from tests.recipe_kit import recipe_with

TOKENIZER = build_character_tokenizer()
CRITERIA = [{"criterion": "it is right", "points": 1}]
RUBRIC: dict[str, Any] = {"rubric": {"judge": {"actor": "verdicts"}, "criteria": CRITERIA}}
SUMS = {"params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, "reasoning_gym": "chain_sum"}
JUDGED: dict[str, Any] = {
    "domains": {
        "sums": {
            "source": {**SUMS, "prompt": "{metadata[expression]}="},
            "reward": [{"exact": {"weight": 0}}, RUBRIC],
            "train": 60, "selection": 4, "holdout": 8, "max_new_tokens": 6,
        },
        "verdicts": {
            "source": {"judging": {"domain": "sums", "prompt": "{question}{answer}?"}},
            "train": 100, "selection": 8, "holdout": 16, "max_new_tokens": 4,
        },
        "pairs": {
            "source": {"judging": {"domain": "sums", "form": "pair", "prompt": "{question}{first}|{second}?"}},
            "train": 100, "selection": 8, "holdout": 16, "max_new_tokens": 2,
        },
    },
    "rollout.max_model_len": 64,
    "evaluation": [{"holdout": {"n": 8}}, {"judge": {"n": 16}}],
}  # fmt: skip


def judged(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Changes of the small recipe: sums that the model judges itself, its judge domains, and then `changes`."""
    return {**copy.deepcopy(JUDGED), **copy.deepcopy(changes or {})}


def judged_recipe(changes: dict[str, Any] | None = None) -> Recipe:
    """The small recipe with `judged` changes."""
    return Recipe.model_validate(recipe_with(judged(changes)))


def sum_of(text: str) -> int:
    """Of `3 + 4=` or `3 + 4=7?`."""
    return sum(int(number.replace(" ", "")) for number in re.findall(r"[+-]? ?\d+", text.partition("=")[0]))


def question(text: str, answer: str, **entry: Any) -> Problem:
    """A problem of the domain sums."""
    return Problem(f"sums/{text}", "sums", ({"role": "user", "content": text},), answer, entry)


class Answering:
    """A rollout client that answers prompts by `rule`: sample number and the prompt's text to a text."""

    def __init__(self, rule: Callable[[int, str], str]) -> None:
        self.rule = rule
        self.asked: list[GroupRequest] = []
        self.waiting: dict[str, GroupRequest] = {}
        self.consumed: list[str] = []
        self.acknowledged: list[str] = []

    def submit(self, groups: Sequence[GroupRequest]) -> None:
        self.asked += groups
        assert not self.waiting.keys() & {group.id for group in groups}
        self.waiting |= {group.id: group for group in groups}

    def collect(self, count: int, ids: Sequence[str] | None = None) -> list[FinishedGroup]:
        assert ids is not None and count == len(ids)
        return [self._finished(self.waiting.pop(name)) for name in ids]

    def consume(self, ids: Sequence[str]) -> None:
        self.consumed += ids

    def acknowledge(self, ids: Sequence[str]) -> None:
        self.acknowledged += ids

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        groups = [GroupRequest(str(row), prompt, sampling, row) for row, prompt in enumerate(prompts)]
        return [self._finished(group).completions for group in groups]

    def _finished(self, group: GroupRequest) -> FinishedGroup:
        text = TOKENIZER.decode(group.prompt_ids, skip_special_tokens=True)
        if "poison" in text:
            return FinishedGroup(group, [], "it ended every engine")
        return FinishedGroup(group, [self._answer(self.rule(j, text), group) for j in range(group.sampling.n)])

    def _answer(self, text: str, group: GroupRequest) -> Completion:
        ids = [*TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.eos_token_id][: group.sampling.max_tokens]
        reason = "stop" if ids[-1] == TOKENIZER.eos_token_id else "length"
        return Completion.of_version(ids, [-0.1] * len(ids), reason, 1)


def right(text: str) -> bool:
    """Whether `3 + 4=7?` is true."""
    return str(sum_of(text)) == text.partition("=")[2].rstrip("?")
