"""Conversations to tokens and back, in DeepSeek-V4's chat layout (`posttrain.data.v4`).

    BOS system <｜User｜> text <｜Assistant｜> </think> answer EOS                      mode "chat"
    BOS system <｜User｜> text <｜Assistant｜> <think> reasoning </think> answer EOS    mode "thinking", "thinking_max"

A conversation is first cut into parts that are each one special token or ordinary text, and every part is
tokenised alone. So a prompt's tokens do not depend on what follows, and ordinary text cannot become a special
token by being spelled like one. Where no text is spelled like one, the tokens are those of the rendered text.

A tokenizer without V4's tokens is used with its own chat template (whose rendering is tokenised as one text:
there the spelling of a special token in a message does count), or, if it has none, with a plain layout:

    system \\n\\n User: text \\n\\n Assistant: \\n answer EOS
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.data.layout import LAYOUT_TOKENS, SPECIAL_TOKENS, THINK_END
from posttrain.data.v4 import (
    Message,
    Mode,
    ParsedTurn,
    Part,
    check_conversation,
    continuation_parts,
    conversation_parts,
    parse_conversation,
    parse_turn,
    seal,
)
from posttrain.data.v4.messages import check_mode
from posttrain.data.v4.text import HALF_PAIR
from posttrain.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "EncodedConversation",
    "Message",
    "Mode",
    "ParsedTurn",
    "Part",
    "check_conversation",
    "conversation_parts",
    "decode_completion",
    "decode_conversation",
    "decode_turn",
    "encode_continuation",
    "encode_conversation",
    "encode_example",
    "encode_prompt",
    "encode_text",
    "has_v4_layout",
    "render_conversation",
    "render_prompt",
    "split_tokens",
]


class EncodedConversation(NamedTuple):
    """A conversation's tokens."""

    token_ids: list[int]
    loss_mask: list[int]
    """1 for what the model itself writes: reasoning, `</think>` after it, answer, tool calls, EOS."""


def render_conversation(messages: Sequence[Message], mode: Mode = "chat") -> str:
    """The text of a whole conversation in the V4 layout. For reading and comparing; tokens come from `encode_*`."""
    return "".join(part.text for part in conversation_parts(messages, mode))


def render_prompt(messages: Sequence[Message], mode: Mode = "chat") -> str:
    """The text of a prompt in the V4 layout, up to where the answer (or the reasoning) begins.

    Raises:
        BadInput: the last message is the assistant's, or a message is malformed.
    """
    _check_prompt(messages)
    return render_conversation(messages, mode)


def _check_prompt(messages: Sequence[Message]) -> None:
    if messages and messages[-1].get("role") == "assistant" and messages[-1].get("task") is None:
        raise BadInput("a prompt ends with a user (or system) message, not with the assistant's")


@lru_cache(maxsize=16)
def has_v4_layout(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a token for each mark of the V4 layout."""
    vocabulary = tokenizer.get_vocab()
    return all(token in vocabulary for token in LAYOUT_TOKENS)


@lru_cache(maxsize=16)
def _guarded_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], frozenset[int]]:
    """Tokens that text must not become: a pattern that matches the first character of one, and their ids.

    Added tokens that are not special (runs of spaces in some vocabularies) stay text, except V4's own marks,
    which its published tokenizer does not flag as special: they all have the wide bar `｜`.
    """
    guarded = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.content and (token.special or token.content in SPECIAL_TOKENS or "｜" in token.content)
    }
    # Grouped by the first character, for which a regular expression searches fast: V4's vocabulary has 1,280 of them.
    begins: dict[str, list[str]] = {}
    for content in guarded:
        begins.setdefault(content[0], []).append(re.escape(content[1:]))
    spelled = "|".join(f"{re.escape(first)}(?={'|'.join(rests)})" for first, rests in begins.items())
    # Unknown characters become the unknown token: that is no disguise.
    ids = frozenset(guarded.values()) - {tokenizer.unk_token_id}
    return re.compile(spelled or r"(?!)"), ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise ordinary text: no special token comes out, however the text is spelled.

    Where the text spells a special token it is cut after that token's first character and the pieces are
    tokenised apart, which every tokenizer allows.

    Raises:
        BadInput: the text has a special token of a single character, which cannot be cut, or half of a surrogate
            pair, which JSON can write and no tokenizer knows.
    """
    half = HALF_PAIR.search(text)
    if half is not None:
        raise BadInput(f"the text has half of a surrogate pair at character {half.start()}, which is no character")
    pattern, guarded_ids = _guarded_tokens(tokenizer)
    cuts = [0, *(match.end() for match in pattern.finditer(text)), len(text)]
    ids: list[int] = []
    for start, end in pairwise(cuts):
        if start < end:
            ids += tokenizer.encode(text[start:end], add_special_tokens=False)
    if len(cuts) > 2 and not guarded_ids.isdisjoint(ids):
        token = next(tokenizer.convert_ids_to_tokens(i) for i in ids if i in guarded_ids)
        raise BadInput(f"the text contains the special token {token!r}, which this tokenizer cannot write as text")
    return ids


def _encode_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part]) -> EncodedConversation:
    """Token ids of laid-out parts. Neighbouring texts (system after system) are tokenised as one."""
    encoded = EncodedConversation([], [])
    for (special, by_model), group in groupby(parts, key=lambda part: (part.special, part.by_model)):
        texts = [part.text for part in group]
        ids = tokenizer.convert_tokens_to_ids(texts) if special else encode_text(tokenizer, "".join(texts))
        encoded.token_ids.extend(ids)
        encoded.loss_mask.extend([int(by_model)] * len(ids))
    return encoded


def _require_v4_layout(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    if not has_v4_layout(tokenizer):
        raise BadInput(f"{what} need a tokenizer with V4's tokens ({', '.join(LAYOUT_TOKENS)}); this one lacks some")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], mode: Mode = "chat") -> list[int]:
    """Token ids of a prompt, up to where the answer (or the reasoning) begins.

    Raises:
        BadInput: the last message is the assistant's, a message is malformed, or the tokenizer's own chat template
            refuses the conversation.
    """
    _check_prompt(messages)
    if has_v4_layout(tokenizer):
        return _encode_parts(tokenizer, conversation_parts(messages, mode)).token_ids
    check_mode(mode)
    check_conversation(messages)
    for index, message in enumerate(messages):
        if message["role"] not in ("system", "user", "assistant") or message.get("tools"):
            raise BadInput(f"message {index}: tools and V4's other roles need a tokenizer with V4's tokens")
    if tokenizer.chat_template:
        return _encode_with_template(tokenizer, messages, mode)
    if mode != "chat":
        raise BadInput("this tokenizer has neither V4's tokens nor a chat template: the mode can only be 'chat'")
    return _encode_plainly(tokenizer, messages)


def _encode_with_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], mode: Mode) -> list[int]:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            # Templates that know no such variable ignore it.
            enable_thinking=mode != "chat",
        )
    except TemplateError as error:
        raise BadInput(f"the tokenizer's chat template refuses the conversation: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)


def _encode_plainly(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    titles = {"system": "", "user": "User: ", "assistant": "Assistant:\n"}
    text = "".join(f"{titles[message['role']]}{message['content']}\n\n" for message in messages) + "Assistant:\n"
    # Only where the tokenizer would put it itself: GPT-2's "begin" token is its end token.
    begins = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return ([tokenizer.bos_token_id] if begins else []) + encode_text(tokenizer, text)


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answer: str,
    mode: Mode = "chat",
    reasoning: str = "",
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the reference completion, which ends with EOS. Their sum is the training text.

    Args:
        reasoning: in a thinking mode, what comes before `</think>`.

    Raises:
        BadInput: as `encode_prompt`; or a thinking mode for a tokenizer without V4's tokens.
    """
    prompt_ids = encode_prompt(tokenizer, messages, mode)
    completion = [Part(answer, False)]
    if mode != "chat":
        _require_v4_layout(tokenizer, f"reference answers in mode {mode!r}")
        completion = [Part(reasoning, False), Part(THINK_END, True), *completion]
    return prompt_ids, [*_encode_parts(tokenizer, completion).token_ids, tokenizer.eos_token_id]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    mode: Mode = "chat",
    known_tools: Sequence[str] = (),
) -> EncodedConversation:
    """Token ids of a whole conversation and which of them supervised training learns.

    In thinking modes, answers whose reasoning the layout drops (see `conversation_parts`) are read, not learned: the
    model would learn to answer without thinking.

    Args:
        known_tools: Names of tools that may be called without being declared in the conversation.

    Raises:
        BadInput: a malformed message, or a tokenizer without V4's tokens.
    """
    _require_v4_layout(tokenizer, "conversations")
    return _encode_parts(tokenizer, conversation_parts(messages, mode, known_tools))


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], mode: Mode = "chat"
) -> list[int]:
    """Token ids of what users and tools answer to an assistant's turn, with the opening of the next one.

    They follow that turn's tokens as they were sampled: nothing is tokenised again. See `continuation_parts`.
    """
    _require_v4_layout(tokenizer, "conversations of several turns")
    return _encode_parts(tokenizer, continuation_parts(messages, mode)).token_ids


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a completion up to its EOS (or its end). Other special tokens stay visible in the text."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return _decode(tokenizer, ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=16)
def _marks(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[token]: token for token in SPECIAL_TOKENS if token in vocabulary}


def split_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Part]:
    """Tokens as parts: V4's special tokens, and the text between them."""
    marks = _marks(tokenizer)
    parts: list[Part] = []
    for special, group in groupby(ids, key=lambda token: token in marks):
        run = list(group)
        parts += [Part(marks[token], True) for token in run] if special else [Part(_decode(tokenizer, run), False)]
    return parts


def decode_turn(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mode: Mode = "chat") -> ParsedTurn:
    """Reasoning, answer and tool calls of a completion, whole or cut off. Never raises: `errors` says what is wrong.

    A tokenizer without V4's tokens writes answers only.
    """
    if not has_v4_layout(tokenizer):
        ended = tokenizer.eos_token_id in ids
        return ParsedTurn("", decode_completion(tokenizer, ids), (), (), "ended" if ended else "content")
    return parse_turn(seal(split_tokens(tokenizer, ids)), mode)


def decode_conversation(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[list[dict[str, Any]], Mode]:
    """The messages of a conversation and its effort: what `encode_conversation` (or `encode_prompt`) wrote.

    Raises:
        BadInput: not a conversation in V4's layout, with the position; a tokenizer without V4's tokens.
    """
    _require_v4_layout(tokenizer, "conversations")
    return parse_conversation(seal(split_tokens(tokenizer, ids)))
