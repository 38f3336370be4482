"""Problems as the rows that TRL's trainers take, and the check that they fit the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.data.encoding import Mode, encode_example, encode_prompt
from posttrain.errors import BadInput
from posttrain.recipe.schema import SftStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.problems import DomainData, Problem
    from posttrain.recipe.schema import Recipe

IGNORED = -100
"""Label of a token without loss."""


def sft_rows(
    tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem], mode: Mode = "chat"
) -> list[dict[str, list[int]]]:
    """Rows for `SFTTrainer`: `input_ids` and `labels`, with loss on the answer and its EOS only.

    TRL takes rows that have both columns as they are; it only cuts them to `max_length`. With
    `dataset_kwargs={"skip_prepare_dataset": True}` it does not even do that.
    """
    rows = []
    for problem in problems:
        rows.append(labelled(*encode_example(tokenizer, problem.messages, problem.answer, mode)))
    return rows


def labelled(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], loss_mask: Sequence[int] | None = None
) -> dict[str, list[int]]:
    """A row with loss on the completion, or on those of its tokens for which `loss_mask` is 1."""
    learned = [1] * len(completion_ids) if loss_mask is None else loss_mask
    labels = [token if one else IGNORED for token, one in zip(completion_ids, learned, strict=True)]
    return {"input_ids": [*prompt_ids, *completion_ids], "labels": [IGNORED] * len(prompt_ids) + labels}


def prompt_rows(
    tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem], mode: Mode = "chat"
) -> list[dict[str, Any]]:
    """Rows for on-policy trainers: `prompt` (messages), `prompt_ids` (its tokens), `problem_id`, `domain`.

    TRL would tokenise `prompt` by the chat template, where the spelling of a special token counts; the trainers
    use `encode_prompt` or `prompt_ids` instead, which agree.
    """
    return [
        {
            "prompt": [{"role": message["role"], "content": message["content"]} for message in problem.messages],
            "prompt_ids": encode_prompt(tokenizer, problem.messages, mode),
            "problem_id": problem.id,
            "domain": problem.domain,
        }
        for problem in problems
    ]


def check_problems(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainData]) -> None:
    """Every problem can be written with the tokenizer and fits the recipe's lengths.

    Domains with an environment are left to `posttrain.stages.episodes.check_episodes`.

    Raises:
        BadInput: a character that the tokenizer does not know; an answer longer than `max_new_tokens`; a prompt with
            `max_new_tokens` beyond `rollout.max_model_len`; an example longer than an SFT stage's `max_length`.
    """
    for name, data in domains.items():
        if recipe.domains[name].environment is not None:
            continue
        longest_prompt = longest_completion = longest_example = 0
        for problem in (*data.train, *data.selection, *data.holdout):
            prompt_ids, completion_ids = encode_example(tokenizer, problem.messages, problem.answer)
            check_known(tokenizer, name, problem, prompt_ids, completion_ids)
            longest_prompt = max(longest_prompt, len(prompt_ids))
            longest_completion = max(longest_completion, len(completion_ids))
            longest_example = max(longest_example, len(prompt_ids) + len(completion_ids))
        check_lengths(recipe, name, longest_prompt, longest_completion, longest_example)


def check_known(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    problem: Problem,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
) -> None:
    """Raise BadInput when a character of a problem became the unknown token."""
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in (*prompt_ids, *completion_ids):
        raise BadInput(
            f"domains.{name}: the tokenizer does not know every character of the problem "
            f"{problem.messages[-1]['content']!r} with the answer {problem.answer!r}"
        )


def check_lengths(recipe: Recipe, name: str, prompt: int, completion: int, example: int) -> None:
    """Raise BadInput when a domain's longest prompt, answer and training example do not fit the recipe."""
    new_tokens = recipe.domains[name].max_new_tokens
    if completion > new_tokens:
        raise BadInput(
            f"domains.{name}.max_new_tokens is {new_tokens}; the longest reference answer has {completion} tokens "
            "with its end token"
        )
    if prompt + new_tokens > recipe.rollout.max_model_len:
        raise BadInput(
            f"rollout.max_model_len is {recipe.rollout.max_model_len}; domains.{name} needs {prompt + new_tokens}: "
            f"its longest prompt has {prompt} tokens and max_new_tokens is {new_tokens}"
        )
    experts = f"experts.overrides.{name}" if name in recipe.stages.experts.overrides else "experts.per_domain"
    stages = [("base", recipe.stages.base), *((experts, stage) for stage in recipe.expert_stages(name))]
    for key, stage in stages:
        if isinstance(stage, SftStage) and stage.conversations is None and example > stage.max_length:
            raise BadInput(
                f"stages.{key}: max_length is {stage.max_length}; the longest example of domains.{name} "
                f"has {example} tokens"
            )
