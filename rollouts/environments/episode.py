"""One conversation with an environment, as tokens.

An episode is a prompt and spans: what the model sampled, with its log-probabilities, and what the environment answered.
Sampled tokens stay as they are. Only the environment's text is tokenised, and what follows a turn is the same whether
the conversation is continued or written all at once (`posttrain.data.encoding.encode_continuation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from posttrain.data.encoding import decode_turn, encode_continuation, encode_prompt
from posttrain.data.v4 import Message, Mode, ParsedTurn
from posttrain.errors import BadInput, RunFailed
from rollouts.environments.protocol import Environment, Observation
from rollouts.types import FAILED, Completion, EpisodeFacts, version_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Outcome = Literal["answered", "turn_limit", "token_limit", "failed"]


@dataclass(frozen=True)
class Limits:
    """Where an episode ends at the latest."""

    turns: int
    """Turns of the model."""
    tokens: int
    """Of the whole episode after its prompt, the environment's included."""
    turn_tokens: int
    """Of one turn of the model."""


@dataclass(frozen=True)
class Span:
    """Tokens of one side."""

    token_ids: list[int]
    completion: Completion | None
    """What the sampler said of them; None for the environment's."""


class Episode:
    """A conversation in the making: take `context_ids`, sample at most `budget` tokens, `advance`; until `outcome`.

    Args:
        environment: Its own; two episodes do not share one.
        prompt_ids: The tokens of the environment's messages, if they are known.

    Raises:
        BadInput: a first prompt that cannot be written with this tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        environment: Environment,
        limits: Limits,
        mode: Mode = "chat",
        prompt_ids: list[int] | None = None,
    ) -> None:
        self._tokenizer, self._environment, self._limits, self._mode = tokenizer, environment, limits, mode
        self.messages: list[Message] = list(environment.reset())
        """The conversation as it was understood; for reading. Training goes by the tokens."""
        self.prompt_ids = encode_prompt(tokenizer, self.messages, mode) if prompt_ids is None else prompt_ids
        self.spans: list[Span] = []
        self.turns: list[ParsedTurn] = []
        self.reward = 0.0
        """The sum of the environment's own rewards."""
        self.tool_calls = self.tool_errors = 0
        self.outcome: Outcome | None = None
        """`answered`: the environment ended it. None while it goes on."""
        self.error: str | None = None
        """Why it `failed`: what the environment raised. It says nothing of the model."""

    @property
    def token_ids(self) -> list[int]:
        """Everything after the prompt."""
        return [token for span in self.spans for token in span.token_ids]

    @property
    def loss_mask(self) -> list[int]:
        """For each of `token_ids`: 1 if the model sampled it, 0 if the environment wrote it."""
        return [int(span.completion is not None) for span in self.spans for _ in span.token_ids]

    @property
    def context_ids(self) -> list[int]:
        """What the next turn is sampled after."""
        return self.prompt_ids + self.token_ids

    @property
    def budget(self) -> int:
        """How many tokens the next turn may have."""
        return min(self._limits.turn_tokens, self._limits.tokens - sum(len(span.token_ids) for span in self.spans))

    @property
    def answer(self) -> str:
        """The text of the last turn if the episode ended with one; else empty."""
        return self.turns[-1].content if self.outcome == "answered" and self.turns else ""

    def advance(self, completion: Completion) -> None:
        """Take the model's next turn, and let the environment answer it."""
        if self.outcome is not None or len(completion.token_ids) > self.budget:
            raise ValueError("the episode is over, or this turn has more tokens than its budget")
        turn = decode_turn(self._tokenizer, completion.token_ids, self._mode)
        self.spans.append(Span(list(completion.token_ids), completion))
        self.turns.append(turn)
        self.messages.append(turn.message())
        if completion.finish_reason != "stop":
            self.outcome = "token_limit"
            return
        try:
            observation = self._environment.step(turn)
        except (BadInput, RunFailed):
            raise
        except Exception as error:  # an environment may be anybody's; its failure costs one episode, not the run
            self.outcome, self.error = "failed", f"{type(error).__name__}: {error}"
            return
        self.reward += observation.reward
        self.tool_calls += observation.tool_calls
        self.tool_errors += observation.tool_errors
        self._observe(observation)

    def _observe(self, observation: Observation) -> None:
        if not observation.messages:
            self.outcome = "answered"
        elif len(self.turns) == self._limits.turns:
            self.outcome = "turn_limit"
        else:
            self._check_reasoning_stays(observation.messages)
            ids = encode_continuation(self._tokenizer, observation.messages, self._mode)
            if len(ids) >= self._limits.tokens - len(self.token_ids):
                self.outcome = "token_limit"
                return
            self.spans.append(Span(ids, None))
            self.messages.extend(observation.messages)

    def _check_reasoning_stays(self, messages: Sequence[Message]) -> None:
        """In V4's format a user's message ends the reasoning before it, unless there are tools."""
        has_tools = any(message.get("tools") for message in self.messages)
        if self._mode != "chat" and not has_tools and any(message["role"] == "user" for message in messages):
            raise BadInput(
                f"in mode {self._mode!r} an environment of several turns declares tools: without them V4 drops the "
                "reasoning of earlier turns, and the tokens that were sampled would not be those of the next prompt"
            )

    def completion(self) -> Completion:
        """The whole episode as one completion of its prompt; `loss_mask` tells the model's tokens from the others.

        The environment's tokens have log-probability 0 and the weight version of the turn before them. The finish
        reason is `stop` if the environment ended the episode, `length` at the limit of tokens, `turn_limit`, or
        `failed: ` with what the environment raised. Routes, if asked for, are the last turn's, for which all was read.
        """
        logprobs: list[float] = []
        versions: list[int] = []
        version, routes = 0, None
        for span in self.spans:
            if span.completion is None:
                logprobs += [0.0] * len(span.token_ids)
                versions += [version] * len(span.token_ids)
            else:
                logprobs += span.completion.logprobs
                versions += span.completion.versions
                version, routes = span.completion.weight_version, span.completion.routes
        reasons = {"answered": "stop", "turn_limit": "turn_limit", "failed": f"{FAILED}{self.error}"}
        reason = reasons.get(self.outcome or "", "length")
        facts = EpisodeFacts(self.loss_mask, len(self.turns), self.tool_calls, self.tool_errors, self.reward)
        if not versions:
            return replace(Completion.of_version([], [], reason, version), episode=facts)
        return Completion(self.token_ids, logprobs, reason, version_spans(versions), routes, facts)
