"""Conversations of several turns: environments, tools, episodes as tokens. Importing this loads no heavy library."""

from rollouts.environments.calculator import calculator
from rollouts.environments.client import EpisodeClient, Episodes, with_episodes
from rollouts.environments.episode import Episode, Limits, Span
from rollouts.environments.problems import SingleTurn, ToolUse
from rollouts.environments.protocol import Environment, Observation
from rollouts.environments.tools import Tool, ToolError, function_tool, named_tool, schema_tool

__all__ = [
    "Environment",
    "Episode",
    "EpisodeClient",
    "Episodes",
    "Limits",
    "Observation",
    "SingleTurn",
    "Span",
    "Tool",
    "ToolError",
    "ToolUse",
    "calculator",
    "function_tool",
    "named_tool",
    "schema_tool",
    "with_episodes",
]
