"""The recipe's rewards as the trainers call them: by problem id and tokens, one reward for each completion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from posttrain.data import Problem
from posttrain.data.encoding import decode_completion
from posttrain.data.tokenizer import load_tokenizer
from posttrain.recipe import Recipe
from rewards import RewardResult, Scorer, build


class DomainRewards:
    """Scores completions of any of the recipe's domains. Picklable: it travels to the trainers.

    Args:
        tokenizer_path: the run's tokenizer.
        problems: those that can be asked for.
    """

    def __init__(self, recipe: Recipe, tokenizer_path: str, problems: Sequence[Problem]) -> None:
        self.specs = {name: config.reward for name, config in recipe.domains.items()}
        self.tokenizer_path = tokenizer_path
        self.problems = {problem.id: problem for problem in problems}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("specs", "tokenizer_path", "problems")
        return {key: self.__dict__[key] for key in kept}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_path)

    @cached_property
    def _scorers(self) -> dict[str, Scorer]:
        return {name: build(specs, f"domains.{name}.reward") for name, specs in self.specs.items()}

    def judge(self, problem_id: str, token_ids: Sequence[int], finish_reason: str) -> tuple[str, RewardResult]:
        """The text of one completion and its score."""
        problem = self.problems[problem_id]
        text = decode_completion(self._tokenizer, token_ids)
        return text, self._scorers[problem.domain].score(problem, text, token_ids, finish_reason)

    def __call__(
        self, problem_ids: Sequence[str], completion_ids: Sequence[Sequence[int]], finish_reasons: Sequence[str]
    ) -> tuple[list[float], list[dict[str, float]]]:
        """Totals and parts, in order."""
        results = [
            self.judge(problem_id, token_ids, reason)[1]
            for problem_id, token_ids, reason in zip(problem_ids, completion_ids, finish_reasons, strict=True)
        ]
        return [result.total for result in results], [result.parts for result in results]
