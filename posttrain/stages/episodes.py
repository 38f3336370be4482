"""Domains with an environment: what their prompts are, how their episodes begin, and what is taught before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from posttrain.data import DomainData, Problem
from posttrain.data.efforts import in_every_effort, with_reasoning
from posttrain.data.encoding import Message, encode_conversation, encode_example, encode_prompt, has_v4_layout
from posttrain.data.rows import IGNORED, check_known, check_lengths, labelled, sft_stages_of
from posttrain.data.tokenizer import load_tokenizer
from posttrain.data.v4 import with_tools
from posttrain.errors import BadInput
from posttrain.imports import import_function
from posttrain.recipe import Recipe
from posttrain.recipe.conversations import EnvironmentConfig
from posttrain.recipe.domains import Effort
from rollouts.environments import Environment, Episode, Limits, Tool, ToolUse, named_tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED_PROBLEMS = 16
"""The longest of a domain: their prompts with the declarations of the tools, and demonstrations, are measured."""


@cache
def _tool(name: str, where: str, seconds: float | None) -> Tool:
    tool = named_tool(name, where)
    return tool if seconds is None else replace(tool, seconds=seconds)


def tools_of(domain: str, config: EnvironmentConfig) -> list[Tool]:
    """The tools of a domain; raises BadInput for one that cannot be imported."""
    where = f"domains.{domain}.environment.tools"
    return [_tool(name, f"{where}[{index}]", config.tool_seconds) for index, name in enumerate(config.tools)]


def make_environment(config: EnvironmentConfig, problem: Problem) -> Environment:
    """The environment of a problem, for one episode.

    Raises:
        BadInput: a tool or factory that cannot be imported, or a factory that makes no environment.
    """
    if config.factory is None:
        return ToolUse(problem.messages, tools_of(problem.domain, config), config.describe)
    where = f"domains.{problem.domain}.environment.factory"
    environment: Environment = import_function(config.factory, where)(problem)
    if not (hasattr(environment, "reset") and hasattr(environment, "step")):
        raise BadInput(f"{where}: {config.factory} returned a {type(environment).__name__} without `reset` and `step`")
    return environment


def policy_messages(recipe: Recipe, problem: Problem) -> Sequence[Message]:
    """A problem as the policy sees it: with its tools, or what its environment begins with."""
    config = recipe.domains[problem.domain].environment
    return problem.messages if config is None else make_environment(config, problem).reset()


class DomainEpisodes:
    """Begins episodes of the recipe's domains with an environment. Picklable: it travels to the trainers.

    Args:
        tokenizer_path: the run's tokenizer.
        problems: those that can be asked for; of domains without an environment, none is an episode.
    """

    def __init__(self, recipe: Recipe, tokenizer_path: str, problems: Sequence[Problem]) -> None:
        found = {name: config.environment for name, config in recipe.domains.items()}
        self.configs = {name: config for name, config in found.items() if config is not None}
        self.tokenizer_path = tokenizer_path
        self.problems = {problem.id: problem for problem in problems if problem.domain in self.configs}

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("configs", "tokenizer_path", "problems")}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_path)

    def __contains__(self, problem_id: str) -> bool:
        return problem_id in self.problems

    def begin(self, problem_id: str, tokens: int, prompt_ids: list[int] | None = None) -> Episode:
        """See `rollouts.environments.Episodes`."""
        problem = self.problems[problem_id]
        config = self.configs[problem.domain]
        limits = Limits(config.turns, tokens, min(tokens, config.turn_tokens or tokens))
        return Episode(self._tokenizer, make_environment(config, problem), limits, problem.mode, prompt_ids)


def episodes_of(recipe: Recipe, tokenizer_path: str, problems: Sequence[Problem]) -> DomainEpisodes | None:
    """The episodes of `problems`; None when none of them has an environment."""
    episodes = DomainEpisodes(recipe, tokenizer_path, problems)
    return episodes if episodes.problems else None


def taught_row(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> dict[str, list[int]]:
    """What SFT learns of a problem with an environment: its demonstration, or else the reference answer.

    Raises:
        BadInput: a demonstration that is no conversation, or that cannot be imported.
    """
    config = recipe.domains[problem.domain].environment
    if config is None or config.demonstrations is None:
        messages = policy_messages(recipe, problem)
        return labelled(*encode_example(tokenizer, messages, problem.answer, problem.mode, problem.reasoning))
    where = f"domains.{problem.domain}.environment.demonstrations"
    messages = import_function(config.demonstrations, where)(problem)
    tools = tools_of(problem.domain, config)
    known = [] if config.describe else [tool.name for tool in tools]
    try:
        declared = with_tools(messages, [tool.schema() for tool in tools]) if config.describe else messages
        encoded = encode_conversation(tokenizer, declared, problem.mode, known)
    except BadInput as error:
        raise BadInput(f"{where}: {config.demonstrations} on {problem.id}: {error}") from error
    return labelled([], encoded.token_ids, encoded.loss_mask)


def check_episodes(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainData]) -> None:
    """As `posttrain.data.rows.check_problems`, for domains with an environment.

    Raises:
        BadInput: see there; or a tokenizer without V4's tokens, an environment that cannot be made, or a
            demonstration that is no conversation.
    """
    for name, data in domains.items():
        config = recipe.domains[name].environment
        if config is None:
            continue
        if not has_v4_layout(tokenizer):
            raise BadInput(
                f"domains.{name}.environment: conversations of several turns need a tokenizer with V4's tokens"
            )
        problems = [*data.train, *data.selection, *data.holdout]
        answer = 0
        for problem in problems:
            prompt_ids, answer_ids = encode_example(tokenizer, problem.messages, problem.answer)
            check_known(tokenizer, name, problem, prompt_ids, answer_ids)
            answer = max(answer, len(answer_ids))
        problems.sort(key=lambda problem: -sum(len(message["content"]) for message in problem.messages))
        longest = problems[:MEASURED_PROBLEMS]
        asked = in_every_effort(longest, recipe.domains[name].modes)
        if sft_stages_of(recipe, name):
            asked = with_reasoning(asked, recipe.domains[name])
        for effort, group in groupby(asked, key=lambda problem: problem.effort):
            _check_mode(recipe, tokenizer, name, list(group), effort, answer)


def _check_mode(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    problems: Sequence[Problem],
    effort: Effort | None,
    answer: int,
) -> None:
    """Raise BadInput when what is shown of the longest problems in a mode does not fit; `answer`: tokens of one."""
    prompts = [encode_prompt(tokenizer, policy_messages(recipe, problem), problem.mode) for problem in problems]
    rows = [taught_row(recipe, tokenizer, problem) for problem in problems]
    check_lengths(recipe, name, max(map(len, prompts)), answer, max(len(row["input_ids"]) for row in rows), effort)
    _check_limits(recipe, name, prompts, rows, effort)


def _check_limits(
    recipe: Recipe,
    name: str,
    prompts: Sequence[list[int]],
    rows: Sequence[Mapping[str, list[int]]],
    effort: Effort | None,
) -> None:
    """Raise BadInput when the model could not finish what it is taught within the limits of an episode."""
    domain = recipe.domains[name]
    episode = max(len(row["input_ids"]) - len(prompt) for row, prompt in zip(rows, prompts, strict=True))
    if episode > domain.new_tokens(effort):
        where = f"domains.{name}.modes.{effort}" if effort else f"domains.{name}"
        raise BadInput(
            f"{where}.max_new_tokens is {domain.new_tokens(effort)}; the longest demonstration has {episode} tokens "
            "after its prompt, the environment's included"
        )
    turn_tokens = domain.environment.turn_tokens if domain.environment else None
    turns = [
        len([*run]) for row in rows for learned, run in groupby(row["labels"], lambda one: one != IGNORED) if learned
    ]
    if turn_tokens is not None and max(turns) > turn_tokens:
        raise BadInput(
            f"domains.{name}.environment.turn_tokens is {turn_tokens}; the longest turn of a demonstration has "
            f"{max(turns)} tokens"
        )
