"""What an environment is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from posttrain.data.v4 import Message, ParsedTurn


@dataclass(frozen=True)
class Observation:
    """What an environment answers to a turn. Without messages the episode is over."""

    messages: tuple[Message, ...] = ()
    """Of roles tool (one for each call of the turn, in order) and user."""
    reward: float = 0.0
    """Added to the episode's; for what only the environment knows. Answers are judged by the domain's rewards."""
    tool_calls: int = 0
    """How many the turn had, and how many of them could not be read or carried out; for the metrics."""
    tool_errors: int = 0


class Environment(Protocol):
    """One conversation's other side. An object serves one episode at a time; `reset` begins a new one."""

    def reset(self) -> list[Message]:
        """The conversation up to the model's first turn; tools that it may call are declared in it."""
        ...

    def step(self, turn: ParsedTurn) -> Observation:
        """Answer a turn that the model has ended. What the model did wrong is told to the model, not raised."""
        ...
