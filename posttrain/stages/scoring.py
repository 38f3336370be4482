"""The recipe's rewards as the trainers call them: by problem id and tokens, one reward for each completion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from posttrain.data import DomainData, Problem
from posttrain.data.efforts import in_effort, split_completion
from posttrain.data.encoding import decode_completion
from posttrain.data.tokenizer import load_tokenizer
from posttrain.errors import BadInput
from posttrain.observe.metrics import MetricsLog
from posttrain.recipe import Recipe
from posttrain.recipe.domains import Effort
from posttrain.stages.judging import Client, Judge
from rewards import Answer, JudgeRequest, RewardResult, Scorer, build, check
from rollouts.types import FAILED


class DomainRewards:
    """Scores completions of any of the recipe's domains. Picklable: it travels to the trainers.

    A reward that fails on an answer is told to `log` the first time, as a warning of `stage`.

    Args:
        tokenizer_path: the run's tokenizer.
        problems: those that can be asked for.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer_path: str,
        problems: Sequence[Problem],
        stage: str = "",
        log: MetricsLog | None = None,
    ) -> None:
        self.recipe = recipe
        domains = recipe.domains.items()
        self.specs = {(name, effort): config.rewards(effort) for name, config in domains for effort in config.efforts}
        self.conversing = {name for name, config in domains if config.environment is not None}
        self.tokenizer_path = tokenizer_path
        self.problems = {problem.id: problem for problem in problems}
        self.stage = stage
        self.log = log
        self.told = False
        self._judges: dict[str, Judge] = {}
        """By their domains, once there is a model to ask."""

    def ask_through(self, client: Client, name: str | None = None) -> None:
        """Have rubrics that the model judges asked of the weights that `client` serves; `name`: see `Judge`."""
        asked = {judge for domain in self.recipe.domains.values() for _, judge, _ in domain.actor_judges}
        self._judges = {judge: Judge(self.recipe, judge, self._tokenizer, client, name) for judge in sorted(asked)}

    def _ask(self, judge: str, votes: int, requests: Sequence[JudgeRequest]) -> Sequence[Sequence[float] | Exception]:
        if judge not in self._judges:
            raise RuntimeError("there is no model to ask")
        return self._judges[judge].grades(votes, requests)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("recipe", "specs", "conversing", "tokenizer_path", "problems", "stage", "log", "told")
        return {key: self.__dict__[key] for key in kept}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_path)

    @cached_property
    def _scorers(self) -> dict[tuple[str, Effort | None], Scorer]:
        return {key: build(specs, f"domains.{key[0]}.reward", self._ask) for key, specs in self.specs.items()}

    def judge(self, problem_id: str, token_ids: Sequence[int], finish_reason: str) -> tuple[str, RewardResult]:
        """As `judge_all`, of one completion."""
        return self.judge_all([problem_id], [token_ids], [finish_reason])[0]

    def judge_all(
        self, problem_ids: Sequence[str], completion_ids: Sequence[Sequence[int]], finish_reasons: Sequence[str]
    ) -> list[tuple[str, RewardResult]]:
        """For each completion its text, with its reasoning, and the score of its answer.

        Of an episode, `completion_ids` are what the model sampled. Answers of a domain in a mode are scored together:
        programs among them run side by side, a judge sees all at once.
        """
        texts: list[str] = []
        results: dict[int, RewardResult] = {}
        asked: dict[tuple[str, Effort | None], dict[int, Answer]] = {}
        for row, one in enumerate(zip(problem_ids, completion_ids, finish_reasons, strict=True)):
            problem, reason = self.problems[one[0]], one[2]
            if reason.startswith(FAILED):
                texts.append("")
                results[row] = RewardResult(problem.id, 0.0, error=f"its environment {reason}")
            else:
                answer = self._answer(problem, one[1], reason)
                texts.append(answer[0])
                asked.setdefault((problem.domain, problem.effort), {})[row] = answer[1]
        for key, answers in asked.items():
            results |= zip(answers, self._scorers[key].score_batch(list(answers.values())), strict=True)
        for row, problem_id in enumerate(problem_ids):
            error = results[row].error
            if error is not None and not self.told:
                self.told = True
                self._tell(self.problems[problem_id], texts[row], error)
        return [(text, results[row]) for row, text in enumerate(texts)]

    def _answer(self, problem: Problem, token_ids: Sequence[int], finish_reason: str) -> tuple[str, Answer]:
        """The text of a completion with its reasoning, and what of it is scored.

        Of an episode, that is the last turn, if it came to an answer; the reasoning of all turns is counted.
        """
        turns = [token_ids]
        if problem.domain in self.conversing:
            eos = self._tokenizer.eos_token_id
            ends = [-1, *(at for at, token in enumerate(token_ids) if token == eos)]
            turns = [token_ids[first + 1 : end + 1] for first, end in pairwise([*ends, len(token_ids)])]
            turns = [turn for turn in turns if turn] or [token_ids]
        split = [split_completion(self._tokenizer, turn, problem.mode) for turn in turns]
        counted = None if problem.mode == "chat" else sum(len(reasoning) for reasoning, _ in split)
        if problem.domain in self.conversing and finish_reason != "stop":
            return "", Answer(problem, "", token_ids, finish_reason, counted)
        text, answer = (decode_completion(self._tokenizer, ids) for ids in (turns[-1], split[-1][1]))
        return text, Answer(problem, answer, token_ids, finish_reason, counted)

    def __call__(
        self, problem_ids: Sequence[str], completion_ids: Sequence[Sequence[int]], finish_reasons: Sequence[str]
    ) -> tuple[list[float], list[dict[str, float]]]:
        """Totals and parts, in order; NaN and no parts where a reward failed, which says nothing of the answer."""
        results = [result for _, result in self.judge_all(problem_ids, completion_ids, finish_reasons)]
        totals = [math.nan if result.error is not None else result.total for result in results]
        return totals, [{} if result.error is not None else result.parts for result in results]

    def _tell(self, problem: Problem, text: str, error: str) -> None:
        if self.log is not None:
            message = f"domains.{problem.domain}.reward failed on the answer {text!r} to {problem.id}: {error}"
            self.log.event("warning", stage=self.stage, message=f"{message} (later failures are only counted)")


def check_rewards(recipe: Recipe, domains: Mapping[str, DomainData]) -> None:
    """Try each domain's rewards on one of its problems.

    Raises:
        BadInput: a reward fails, or calls the reference answer wrong.
    """
    for name, data in domains.items():
        config, where = recipe.domains[name], f"domains.{name}.reward"
        for effort in config.efforts:
            problem = in_effort(data.train[0], effort, config.modes[effort]) if effort else data.train[0]
            check(build(config.rewards(effort), where), problem, where)
        if config.actor_judges:
            for complaint in build(config.reward, where).unfit([*data.train, *data.selection, *data.holdout]).items():
                raise BadInput(f"{where}: the problem {complaint[0]} cannot be judged: {complaint[1]}")
