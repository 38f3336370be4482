"""Problems as the rows that TRL's trainers take, and the check that they fit the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.data.efforts import in_every_effort, with_reasoning
from posttrain.data.encoding import encode_example, encode_prompt, has_v4_layout
from posttrain.errors import BadInput
from posttrain.recipe.stages import SftStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.problems import DomainData, Problem
    from posttrain.recipe.domains import Effort
    from posttrain.recipe.schema import Recipe

IGNORED = -100
"""Label of a token without loss."""


def sft_rows(tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem]) -> list[dict[str, list[int]]]:
    """Rows for `SFTTrainer`: `input_ids` and `labels`, with loss on reasoning, answer and its EOS only.

    TRL takes rows that have both columns as they are; it only cuts them to `max_length`. With
    `dataset_kwargs={"skip_prepare_dataset": True}` it does not even do that.
    """
    rows = []
    for problem in problems:
        rows.append(labelled(*_encode(tokenizer, problem)))
    return rows


def labelled(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], loss_mask: Sequence[int] | None = None
) -> dict[str, list[int]]:
    """A row with loss on the completion, or on those of its tokens for which `loss_mask` is 1."""
    learned = [1] * len(completion_ids) if loss_mask is None else loss_mask
    labels = [token if one else IGNORED for token, one in zip(completion_ids, learned, strict=True)]
    return {"input_ids": [*prompt_ids, *completion_ids], "labels": [IGNORED] * len(prompt_ids) + labels}


def prompt_rows(tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Rows for on-policy trainers: `prompt` (messages), `prompt_ids` (its tokens), `problem_id`, `domain`.

    TRL would tokenise `prompt` by the chat template, where the spelling of a special token counts; the trainers
    use `encode_prompt` or `prompt_ids` instead, which agree.
    """
    return [
        {
            "prompt": [{"role": message["role"], "content": message["content"]} for message in problem.messages],
            "prompt_ids": encode_prompt(tokenizer, problem.messages, problem.mode),
            "problem_id": problem.id,
            "domain": problem.domain,
        }
        for problem in problems
    ]


def _encode(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the reference completion."""
    return encode_example(tokenizer, problem.messages, problem.answer, problem.mode, problem.reasoning)


def check_problems(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainData]) -> None:
    """Every problem can be written with the tokenizer and fits the recipe's lengths.

    Domains with an environment are left to `posttrain.stages.episodes.check_episodes`.

    Raises:
        BadInput: modes without V4's tokens, or without reasoning for SFT; a character that the tokenizer does not know;
            an answer longer than `max_new_tokens`; a prompt with `max_new_tokens` beyond `rollout.max_model_len`; an
            example longer than an SFT stage's `max_length`.
    """
    for name, data in domains.items():
        config = recipe.domains[name]
        if config.environment is not None:
            continue
        if config.modes and not has_v4_layout(tokenizer):
            raise BadInput(
                f"domains.{name}.modes: reasoning efforts need a tokenizer with V4's tokens; this one has not"
            )
        problems = [*data.train, *data.selection, *data.holdout]
        asked = in_every_effort(problems, config.modes)
        if sft_stages_of(recipe, name):
            asked = with_reasoning(asked, config)
        for first in range(0, len(asked), len(problems)):
            _check_mode(recipe, tokenizer, name, asked[first : first + len(problems)])


def _check_mode(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, name: str, problems: Sequence[Problem]) -> None:
    """Check a domain's problems as they are asked in one mode."""
    longest_prompt = longest_completion = longest_example = 0
    for problem in problems:
        prompt_ids, completion_ids = _encode(tokenizer, problem)
        check_known(tokenizer, name, problem, prompt_ids, completion_ids)
        longest_prompt = max(longest_prompt, len(prompt_ids))
        longest_completion = max(longest_completion, len(completion_ids))
        longest_example = max(longest_example, len(prompt_ids) + len(completion_ids))
    check_lengths(recipe, name, longest_prompt, longest_completion, longest_example, problems[0].effort)


def check_known(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    problem: Problem,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
) -> None:
    """Raise BadInput when a character of a problem became the unknown token."""
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in (*prompt_ids, *completion_ids):
        with_steps = f", the reasoning {problem.reasoning!r}" if problem.reasoning else ""
        raise BadInput(
            f"domains.{name}: the tokenizer does not know every character of the problem "
            f"{problem.messages[-1]['content']!r} with the answer {problem.answer!r}{with_steps}"
        )


def check_lengths(
    recipe: Recipe, name: str, prompt: int, completion: int, example: int, effort: Effort | None = None
) -> None:
    """Raise BadInput when a domain's longest prompt, answer and training example do not fit the recipe."""
    new_tokens = recipe.domains[name].new_tokens(effort)
    where = f"domains.{name}.modes.{effort}" if effort else f"domains.{name}"
    if completion > new_tokens:
        raise BadInput(
            f"{where}.max_new_tokens is {new_tokens}; the longest reference answer has {completion} tokens "
            "with its end token" + (" and its reasoning" if effort else "")
        )
    if prompt + new_tokens > recipe.rollout.max_model_len:
        raise BadInput(
            f"rollout.max_model_len is {recipe.rollout.max_model_len}; {where} needs {prompt + new_tokens}: "
            f"its longest prompt has {prompt} tokens and max_new_tokens is {new_tokens}"
        )
    for key, stage in sft_stages_of(recipe, name):
        if example > stage.max_length:
            raise BadInput(
                f"stages.{key}: max_length is {stage.max_length}; the longest example of {where} has {example} tokens"
            )


def sft_stages_of(recipe: Recipe, domain: str) -> list[tuple[str, SftStage]]:
    """The stages that learn from the domain's reference answers, by their keys below `stages`."""
    expert = recipe.expert_of(domain)
    experts = f"experts.overrides.{expert}" if expert in recipe.stages.experts.overrides else "experts.per_domain"
    stages = [("base", recipe.stages.base), *((experts, stage) for stage in recipe.expert_stages(domain))]
    return [(key, stage) for key, stage in stages if isinstance(stage, SftStage) and stage.conversations is None]
