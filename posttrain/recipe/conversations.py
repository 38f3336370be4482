"""The parts of a recipe that are about conversations of several turns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.recipe.section import Section, wrong


class EnvironmentConfig(Section):
    """The other side of a conversation of several turns (docs/environments.md). Give `tools` or `factory`."""

    tools: list[str] = []
    """`calculator`, or `package.module:name` of a function or of a `rollouts.environments.Tool`. The first turn that
    calls none ends the episode."""
    tool_seconds: float | None = Field(None, gt=0)
    """How long a call may take; one that takes longer is an error that the model reads. Default: the tool's own, 10."""
    factory: str | None = None
    """`package.module:function`, which makes the environment of a problem."""
    turns: int = Field(4, ge=1)
    """The most turns that the model has in an episode."""
    turn_tokens: int | None = Field(None, ge=1)
    """The most tokens of one turn. Default: the domain's `max_new_tokens`, which bounds the whole episode, the
    environment's tokens included."""
    describe: bool = True
    """Declare the tools to the model, as V4 does; that is about 300 tokens. Without it, it knows them from examples."""
    demonstrations: str | None = None
    """`package.module:function`, which gives the conversation that solves a problem: learned by SFT instead of the
    reference answer."""

    @model_validator(mode="after")
    def _one_kind(self) -> EnvironmentConfig:
        if bool(self.tools) == (self.factory is not None):
            raise wrong("", "give either `tools` or `factory`")
        if self.factory is not None and self.tool_seconds is not None:
            raise wrong("tool_seconds", "bounds calls of `tools`; an environment from `factory` calls its own")
        if self.factory is not None and not self.describe:
            raise wrong("describe", "is about `tools`; an environment from `factory` says itself what the model reads")
        for index, name in enumerate(self.tools):
            if name in self.tools[:index]:
                raise wrong(f"tools[{index}]", f"{name} is there twice")
        return self


class ConversationsConfig(Section):
    """A file of conversations, with tools and reasoning if they have any (docs/environments.md)."""

    jsonl: str
    """A file; relative to the recipe."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """Rows that are malformed, too long, or ask what a domain holds out: `refuse` the file before anything starts, or
    leave such rows out and count them."""
