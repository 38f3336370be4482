"""Episodes without an engine: turns as an engine would return them, and a policy that is a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.data.layout import DSML, EOS
from posttrain.data.tokenizer import build_character_tokenizer
from rollouts.environments import Environment, Episode, Limits
from rollouts.types import Completion, FinishedGroup, GroupRequest

TOKENIZER = build_character_tokenizer()


def says(text: str, version: int = 3) -> Completion:
    """A completion as an engine would return it: the text's tokens, with special tokens where they are spelled."""
    ids = TOKENIZER.encode(text)
    reason = "stop" if text.endswith(EOS) else "length"
    return Completion.of_version(ids, [-0.5 - index / 64 for index in range(len(ids))], reason, version)


def call(expression: str) -> str:
    """A turn that calls the calculator."""
    return (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="calculator">\n<{DSML}parameter name="expression" string="true">'
        f"{expression}</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>{EOS}"
    )


def play(episode: Episode, turns: Sequence[Completion]) -> None:
    """Take these turns; the episode has to be over after the last."""
    for turn in turns:
        assert episode.outcome is None
        episode.advance(turn)
    assert episode.outcome is not None


class ScriptedService:
    """A rollout service whose samples are what a function says.

    `policy` is asked for the text of each sample, with the request's prompt as text. What came last is finished first;
    `fairly`, what came first.
    """

    def __init__(
        self, policy: Callable[[GroupRequest, str], str], model: PreTrainedModel | None = None, fairly: bool = False
    ) -> None:
        self.policy = policy
        self.fairly = fairly
        self.model = model
        """Whose log-probabilities the samples have; else they are made up."""
        self.version: int | None = None
        self.asked: list[GroupRequest] = []
        self.running: list[GroupRequest] = []
        self.failing: set[str] = set()
        self.consumed: list[str] = []
        self.acknowledged: list[str] = []
        self.forgotten: list[str] = []
        """Prefixes."""
        self.cancelled: list[str] = []

    def weight_version(self) -> int | None:
        return self.version

    def publish(self, weights: Mapping[str, np.ndarray], version: int) -> float:
        if self.model is not None:
            self.model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        self.version = version
        return 0.0

    def submit(self, groups: Sequence[GroupRequest]) -> None:
        self.asked += groups
        self.running += groups

    def collect(
        self, count: int, ids: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[FinishedGroup]:
        assert ids is None
        possible = min(count, len(self.running)) if timeout is None else 0
        taken = [self.running.pop(0 if self.fairly else -1) for _ in range(possible)]
        return [self._finish(request) for request in taken]

    def consume(self, ids: Sequence[str]) -> None:
        self.consumed += ids

    def acknowledge(self, ids: Sequence[str]) -> None:
        self.acknowledged += ids

    def forget_under(self, prefix: str) -> None:
        self.forgotten.append(prefix)

    def cancel(self, ids: Sequence[str]) -> None:
        self.cancelled += ids
        self.running = [request for request in self.running if request.id not in ids]

    def _finish(self, request: GroupRequest) -> FinishedGroup:
        if request.id in self.failing:
            return FinishedGroup(request, [], "it ended 3 engines")
        text = self.policy(request, TOKENIZER.decode(request.prompt_ids))
        completions = [says(text, self.version or 0) for _ in range(request.sampling.n)]
        if self.model is not None:
            completions = [replace(one, logprobs=self._logprobs(request, one)) for one in completions]
        return FinishedGroup(request, completions)

    @torch.no_grad()
    def _logprobs(self, request: GroupRequest, completion: Completion) -> list[float]:
        assert self.model is not None
        begin = len(request.prompt_ids)
        logits_TV = self.model(input_ids=torch.tensor([request.prompt_ids + completion.token_ids])).logits[0]
        logps_TV = torch.log_softmax(logits_TV[begin - 1 : -1], dim=-1)
        return logps_TV[range(len(completion.token_ids)), completion.token_ids].tolist()


class LocalEpisodes:
    """Episodes of problems that are given by their environments."""

    def __init__(self, environments: Mapping[str, Callable[[], Environment]], limits: Limits) -> None:
        self.environments = environments
        self.limits = limits

    def __contains__(self, problem_id: str) -> bool:
        return problem_id in self.environments

    def begin(self, problem_id: str, tokens: int, prompt_ids: list[int] | None = None) -> Episode:
        limits = replace(self.limits, tokens=tokens)
        return Episode(TOKENIZER, self.environments[problem_id](), limits, prompt_ids=prompt_ids)
