"""Supervised fine-tuning: the base on all domains, an expert on its own, or either on a file of conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

from posttrain.data import DomainData, Problem
from posttrain.data.conversations import Conversation, ConversationFile, read_conversations
from posttrain.data.efforts import in_shares, with_reasoning
from posttrain.data.encoding import encode_conversation
from posttrain.data.mixture import in_turn, share_of
from posttrain.data.problems import split_key
from posttrain.data.rows import labelled, sft_rows
from posttrain.recipe import Recipe
from posttrain.recipe.stages import SftStage
from posttrain.stages.episodes import taught_row, tools_of
from posttrain.stages.work import Work
from posttrain.trainers.jobs import SftJob, SnapshotPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
Row = dict[str, list[int]]


def run_sft(work: Work, name: str, config: SftStage, domains: list[str], start: Path, slot: int = 0) -> Path:
    """Train on the reference answers of `domains` in their shares, or on conversations, and return the checkpoint."""

    def job(output: str, snapshots: SnapshotPlan | None) -> SftJob:
        count = config.steps * config.batch_size
        if config.conversations is None:
            rows = [_problem_row(work, problem) for problem in draw_examples(work, name, domains, count, config.shares)]
        else:
            rows = _conversation_rows(work, name, config, count)
        return SftJob(name, config, str(start), output, rows, snapshots)

    return work.stage(name, config.steps, lambda *place: work.cluster.trainers[slot].sft.remote(job(*place)))


def _problem_row(work: Work, problem: Problem) -> Row:
    if work.recipe.domains[problem.domain].environment is not None:
        return taught_row(work.recipe, work.tokenizer, problem)
    return sft_rows(work.tokenizer, [problem])[0]


def draw_examples(
    work: Work, stage: str, domains: list[str], count: int, shares: Mapping[str, float] | None = None
) -> list[Problem]:
    """`count` training problems, the domains in turn, each problem as seldom as possible, modes in their shares."""
    order = Random(f"{work.recipe.seed}/{stage}")
    drawn = {}
    for domain in domains:
        config = work.recipe.domains[domain]
        picked = _repeated(work.domains[domain].train, share_of(domain, domains, shares or {}, count), order)
        drawn[domain] = with_reasoning(in_shares(picked, config.modes), config)
    return in_turn(drawn, shares or {}, count)


def _repeated(items: list[Item], count: int, order: Random) -> list[Item]:
    """`count` of the items, each as seldom as possible."""
    picked: list[Item] = []
    while len(picked) < count:
        picked += order.sample(items, min(len(items), count - len(picked)))
    return picked


def _conversation_rows(work: Work, name: str, config: SftStage, count: int) -> list[Row]:
    found = conversations_of(work.recipe, name, config, work.tokenizer, work.domains)
    if found.dropped:
        message = f"{len(found.dropped)} conversations were left out; the first: {found.dropped[0]}"
        work.run.append_event({"event": "warning", "stage": name, "message": message})
    rows = [_encoded(work.recipe, work.tokenizer, one) for one in found.conversations]
    return _repeated(rows, count, Random(f"{work.recipe.seed}/{name}"))


def check_conversations(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainData]) -> None:
    """Raise BadInput when a stage's file of conversations has no good row, or a bad one that is not to be dropped."""
    for key, stage in recipe.sft_stages().items():
        if stage.conversations is not None:
            conversations_of(recipe, key, stage, tokenizer, domains)


def conversations_of(
    recipe: Recipe, key: str, config: SftStage, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainData]
) -> ConversationFile:
    """What a stage's file holds.

    Args:
        key: the stage's, for messages.

    Raises:
        BadInput: bad rows, by file and line: malformed, too long, or a prompt that is kept for evaluation.
    """
    assert config.conversations is not None
    kept = {
        split_key(problem.messages): name
        for name, data in domains.items()
        for problem in (*data.selection, *data.holdout)
    }

    def complaint(conversation: Conversation) -> str | None:
        row = _encoded(recipe, tokenizer, conversation)
        begins = [message["role"] for message in conversation.messages].index("assistant")
        domain = kept.get(split_key(conversation.messages[:begins]))
        if domain is not None:
            return f"its prompt is one that domains.{domain} selects on or holds out"
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in row["input_ids"]:
            return "the tokenizer does not know every character of it"
        if len(row["input_ids"]) > config.max_length:
            return f"has {len(row['input_ids'])} tokens; max_length is {config.max_length}"
        return None if max(row["labels"]) >= 0 else f"in mode {conversation.mode!r} there is nothing to learn in it"

    path, drop = config.conversations.jsonl, config.conversations.bad_rows == "drop"
    return read_conversations(path, f"{key}.conversations", drop, _known_tools(recipe), complaint)


def _encoded(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Row:
    encoded = encode_conversation(tokenizer, conversation.messages, conversation.mode, _known_tools(recipe))
    return labelled([], encoded.token_ids, encoded.loss_mask)


def _known_tools(recipe: Recipe) -> list[str]:
    """Tools of the recipe that are not declared to the model."""
    return [
        tool.name
        for name, domain in recipe.domains.items()
        if domain.environment is not None and not domain.environment.describe
        for tool in tools_of(name, domain.environment)
    ]
