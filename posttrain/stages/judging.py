"""The model as the judge of its own answers: V4's generative reward model, which is the actor (report, §5.1).

A verdict is an answer to a judging problem, posed as the recipe's judge domain poses its own, and sampled by the same
rollout workers from the weights that are trained or evaluated.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from posttrain.data import DomainData, Problem
from posttrain.data.efforts import in_effort, split_completion
from posttrain.data.encoding import decode_completion, encode_prompt
from posttrain.data.judging import VERDICTS, judging_problem
from posttrain.data.problems import prompt_text
from posttrain.errors import BadInput, RunFailed
from posttrain.recipe import Recipe
from rewards import JudgeRequest, build
from rollouts.types import UNNAMED, Completion, FinishedGroup, GroupRequest, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Client(Protocol):
    """What is needed of the rollout service; see `rollouts.pool.RolloutClient`."""

    def submit(self, groups: Sequence[GroupRequest]) -> None: ...

    def collect(self, count: int, ids: Sequence[str] | None = None) -> list[FinishedGroup]: ...

    def consume(self, ids: Sequence[str]) -> None: ...

    def acknowledge(self, ids: Sequence[str]) -> None: ...


class NoVerdict(ValueError):
    """The judge said nothing that is a verdict."""


class Judge:
    """Asks the weights that the engines serve for verdicts. A single vote is the likeliest answer, several are sampled.

    Args:
        domain: the judge domain; one with modes is asked in the first of them.
        name: what the ids of requests begin with, in a stage that may be started again: its n-th call then has the same
            ids and random numbers whenever it runs, and finds in the log what was sampled before. Default: ids that
            nobody asks for again.
    """

    def __init__(
        self, recipe: Recipe, domain: str, tokenizer: PreTrainedTokenizerBase, client: Client, name: str | None = None
    ) -> None:
        self.domain = domain
        self.config = recipe.domains[domain]
        assert self.config.judging is not None
        self.judging = self.config.judging
        self.effort = self.config.efforts[0]
        self.tokenizer = tokenizer
        self.client = client
        self.kept = name is not None
        self.name = name or f"{UNNAMED}{uuid.uuid4().hex}"
        self.room = recipe.rollout.max_model_len - self.config.new_tokens(self.effort)
        self.seed = recipe.seed
        self.calls = 0
        # The first part of the judge domain's reward says which verdicts are right, so it can tell what was said.
        self.scorer = build(self.config.rewards(self.effort)[:1], f"domains.{domain}.reward")

    def grades(self, votes: int, requests: Sequence[JudgeRequest]) -> list[list[float] | Exception]:
        """For each answer the share of `votes` that say yes, criterion by criterion; an exception where there is none.

        Equal questions about equal answers are asked once.
        """
        asked = [
            [
                judging_problem(
                    self.domain, self.judging, self.config.system, prompt_text(request.problem.messages),
                    [request.text], "", criterion,
                )
                for criterion in request.criteria
            ]
            for request in requests
        ]  # fmt: skip
        distinct = {problem.id: problem for problems in asked for problem in problems}
        found = dict(zip(distinct, self.verdicts(list(distinct.values()), votes), strict=True))
        return [_grades([found[problem.id] for problem in problems]) for problems in asked]

    def verdicts(self, problems: Sequence[Problem], votes: int = 1) -> list[list[str] | Exception]:
        """The verdicts on judging problems, those that can be read; why there is none at all for a problem."""
        posed = [self._posed(problem) for problem in problems]
        prompts = [list(encode_prompt(self.tokenizer, problem.messages, problem.mode)) for problem in posed]
        fits = [row for row, prompt in enumerate(prompts) if len(prompt) <= self.room]
        answers = dict(zip(fits, self._ask([prompts[row] for row in fits], votes), strict=True))
        return [self._read(problem, prompts[row], answers.get(row)) for row, problem in enumerate(posed)]

    def _posed(self, problem: Problem) -> Problem:
        return problem if self.effort is None else in_effort(problem, self.effort, self.config.modes[self.effort])

    def _ask(self, prompts: Sequence[list[int]], votes: int) -> list[FinishedGroup]:
        """Through the stage's own client, so that should the service die, its weights come back with its requests."""
        call, self.calls = self.calls, self.calls + 1
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{self.domain}/{call}".encode()).digest()[:4], "big") >> 1
        sampling = Sampling(
            self.config.new_tokens(self.effort), temperature=0.0 if votes == 1 else 1.0, n=votes, seed=seed
        )
        groups = [
            GroupRequest(
                f"{self.name}/{self.domain}/{call}/{row}-{_digest(prompt)}", prompt, sampling, row, self.domain
            )
            for row, prompt in enumerate(prompts)
        ]
        if not groups:
            return []
        ids = [group.id for group in groups]
        try:
            self.client.submit(groups)
            found = self.client.collect(len(ids), ids)
            (self.client.consume if self.kept else self.client.acknowledge)(ids)
        except Exception as error:  # no answer is bad because the engines are gone
            raise RunFailed(f"the judge could not be asked: {error}") from error
        return found

    def _read(self, problem: Problem, prompt: Sequence[int], found: FinishedGroup | None) -> list[str] | Exception:
        if found is None:
            return NoVerdict(f"the judge's prompt has {len(prompt)} tokens, there is room for {self.room}")
        if found.failure is not None:
            return NoVerdict(f"the judge's request was given up: {found.failure}")
        read = [self._verdict(problem, answer) for answer in found.completions]
        known = [verdict for verdict in read if verdict is not None]
        if known:
            return known
        said = self._text(problem, found.completions[0])
        return NoVerdict(f"the judge says {said!r}, not {' or '.join(VERDICTS[self.judging.form])}")

    def _verdict(self, problem: Problem, answer: Completion) -> str | None:
        """What a judge says: the verdict for which, were it right, its answer would be rewarded."""
        text = self._text(problem, answer)
        said = [
            verdict
            for verdict in VERDICTS[self.judging.form]
            if self.scorer.score(replace(problem, answer=verdict), text, answer.token_ids, answer.finish_reason).correct
        ]
        return said[0] if len(said) == 1 else None

    def _text(self, problem: Problem, answer: Completion) -> str:
        """Its answer, without reasoning."""
        _, answer_ids = split_completion(self.tokenizer, answer.token_ids, problem.mode)
        return decode_completion(self.tokenizer, answer_ids)


def check_judge_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainData]) -> None:
    """Raise BadInput when the judge of a rubric could not read the longest answer to the longest question."""
    for name, config in recipe.domains.items():
        for _, domain, options in config.actor_judges:
            judge = recipe.domains[domain]
            assert judge.judging is not None
            problems = [*domains[name].train, *domains[name].selection, *domains[name].holdout]
            longest = max(problems, key=lambda problem: len(prompt_text(problem.messages)))
            criteria = [one["criterion"] for one in longest.entry.get("rubric") or options.get("criteria") or ()]
            criterion = max(criteria, key=len, default=None)
            question = prompt_text(longest.messages)
            posed = judging_problem(domain, judge.judging, judge.system, question, [""], "", criterion)
            prompt = len(encode_prompt(tokenizer, posed.messages))
            needed = prompt + config.longest_completion + judge.longest_completion
            if needed > recipe.rollout.max_model_len:
                raise BadInput(
                    f"rollout.max_model_len is {recipe.rollout.max_model_len}; judging domains.{name} as "
                    f"domains.{domain} does needs {needed}: its longest question has {prompt} tokens as the judge is "
                    f"asked, max_new_tokens is {config.longest_completion}, and the judge's {judge.longest_completion}"
                )


def _grades(verdicts: Sequence[list[str] | Exception]) -> list[float] | Exception:
    grades = []
    for found in verdicts:
        if isinstance(found, Exception):
            return found
        grades.append(found.count(VERDICTS["single"][0]) / len(found))
    return grades


def _digest(prompt: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, prompt)).encode()).hexdigest()[:12]
