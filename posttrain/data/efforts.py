"""Problems in V4's reasoning efforts: asking, reasoning to show, and what of a completion is the answer.

A recipe's modes are `chat` (non-think), `high` (think-high) and `max` (think-max). A problem that is asked in a mode
has an id of its own, `<id>@<mode>`: its answers are a group of their own, and are rewarded as that mode says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from posttrain.data.layout import THINK_END
from posttrain.errors import BadInput
from posttrain.imports import import_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.problems import Problem
    from posttrain.data.v4 import Mode
    from posttrain.recipe.domains import DomainConfig, Effort, ModeConfig


def in_effort(problem: Problem, effort: Effort, config: ModeConfig) -> Problem:
    """The problem as it is asked in a mode, without reasoning to show."""
    modes: dict[Effort, Mode] = {"chat": "chat", "high": "thinking", "max": "thinking_max"}
    asked = replace(problem, id=f"{problem.id}@{effort}", effort=effort, mode=modes[effort])
    if config.prefix is None:
        return asked
    messages = ({"role": "system", "content": config.prefix}, *problem.messages)
    return replace(asked, messages=messages, mode="chat" if effort == "chat" else "thinking")


def in_shares(problems: Sequence[Problem], modes: Mapping[Effort, ModeConfig]) -> list[Problem]:
    """Each problem in one of the modes: every beginning of the list has them in their shares, as near as can be."""
    if not modes:
        return list(problems)
    total = sum(mode.share for mode in modes.values())
    owed = dict.fromkeys(modes, 0.0)
    asked = []
    for problem in problems:
        for effort, mode in modes.items():
            owed[effort] += mode.share / total
        effort = max(owed, key=lambda name: owed[name])  # the first one listed where they are equal
        owed[effort] -= 1
        asked.append(in_effort(problem, effort, modes[effort]))
    return asked


def in_every_effort(problems: Sequence[Problem], modes: Mapping[Effort, ModeConfig]) -> list[Problem]:
    """All problems in the first mode, then all in the second, and so on; as they are without modes."""
    if not modes:
        return list(problems)
    return [in_effort(problem, effort, mode) for effort, mode in modes.items() for problem in problems]


def with_reasoning(problems: Iterable[Problem], config: DomainConfig) -> list[Problem]:
    """Problems that are asked in modes, with the reasoning that SFT shows in modes that think.

    Raises:
        BadInput: a problem without reasoning, or a function that fails.
    """
    return [
        replace(problem, reasoning=_reasoning(problem, config))
        if problem.effort is not None and problem.mode != "chat"
        else problem
        for problem in problems
    ]


def _reasoning(problem: Problem, config: DomainConfig) -> str:
    assert problem.effort is not None
    mode, where = config.modes[problem.effort], f"domains.{problem.domain}.modes.{problem.effort}.reasoning"
    if mode.reasoning is None:
        text = problem.entry.get("reasoning")
        if text is None and config.environment is not None and config.environment.demonstrations is not None:
            return ""  # the demonstration may bring its own
        if not isinstance(text, str):
            raise BadInput(
                f"{where}: SFT needs the reasoning that leads to each answer, and {problem.id} has none: bring "
                "`reasoning` (text) in every row of the source, or name a function that writes it"
            )
        return text
    try:
        text = import_function(mode.reasoning, where)(problem)
    except BadInput:
        raise
    except Exception as error:  # the user's function may fail in any way
        raise BadInput(f"{where}: {mode.reasoning} fails on {problem.id}: {type(error).__name__}: {error}") from error
    if not isinstance(text, str):
        raise BadInput(f"{where}: {mode.reasoning} gives {type(text).__name__} for {problem.id}, not text")
    return text


def split_completion(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], mode: Mode
) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens of the reasoning, with its `</think>`, and those of the answer.

    In a mode that thinks, a completion without `</think>` is all reasoning.
    """
    if mode == "chat":
        return token_ids[:0], token_ids
    end = _think_end(tokenizer)
    length = token_ids.index(end) + 1 if end in token_ids else len(token_ids)
    return token_ids[:length], token_ids[length:]


@lru_cache(maxsize=16)
def _think_end(tokenizer: PreTrainedTokenizerBase) -> int:
    token: Any = tokenizer.convert_tokens_to_ids(THINK_END)
    return int(token)
