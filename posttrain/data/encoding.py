"""Conversations to tokens, in DeepSeek-V4's chat layout.

    BOS system <｜User｜> text <｜Assistant｜> </think> answer EOS                        mode "chat"
    BOS system <｜User｜> text <｜Assistant｜> <think> reasoning </think> answer EOS      mode "thinking"

A conversation is first cut into parts that are each one special token or ordinary text, and every part is
tokenised alone. So a prompt's tokens do not depend on what follows, and ordinary text cannot become a special
token by being spelled like one. Reasoning of turns before the last user message is dropped, as V4 does when no
tools are in play.

A tokenizer without V4's tokens is used with its own chat template (whose rendering is tokenised as one text:
there the spelling of a special token in a message does count), or, if it has none, with a plain layout:

    system \\n\\n User: text \\n\\n Assistant: \\n answer EOS
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from posttrain.data.layout import ASSISTANT, BOS, EOS, LAYOUT_TOKENS, SPECIAL_TOKENS, THINK_END, THINK_START, USER
from posttrain.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""`role` (system, user or assistant), `content` (text) and, for an assistant, optionally `reasoning` (text)."""
Mode = Literal["chat", "thinking"]

ROLES = ("system", "user", "assistant")


class Part(NamedTuple):
    """A piece of a conversation: one special token, or text in which nothing is special."""

    text: str
    special: bool


def _merge_user_turns(messages: Sequence[Message]) -> list[Message]:
    """Neighbouring user messages are one turn, joined by an empty line."""
    merged: list[Message] = []
    for message in messages:
        if message["role"] == "user" and merged and merged[-1]["role"] == "user":
            merged[-1] = {"role": "user", "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def _check_messages(messages: Sequence[Message], mode: str) -> None:
    if mode not in ("chat", "thinking"):
        raise BadInput(f"the mode is 'chat' or 'thinking', not {mode!r}")
    if not messages:
        raise BadInput("a conversation needs at least one message")
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise BadInput(f"message {index}: the role is one of {', '.join(ROLES)}, not {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            raise BadInput(f"message {index}: `content` is text, not {type(message.get('content')).__name__}")


def conversation_parts(messages: Sequence[Message], mode: Mode = "chat") -> list[Part]:
    """Lay a conversation out. After a last user or system message it opens the assistant's turn.

    Raises:
        BadInput: an unknown role or mode, or content that is not text.
    """
    _check_messages(messages, mode)
    turns = _merge_user_turns(messages)
    last_user = max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    parts = [Part(BOS, True)]
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            if mode == "thinking" and index > last_user:
                parts += [Part(turn.get("reasoning") or "", False), Part(THINK_END, True)]
            parts += [Part(turn["content"], False), Part(EOS, True)]
            continue
        if turn["role"] == "user":
            parts.append(Part(USER, True))
        parts.append(Part(turn["content"], False))
        if index + 1 == len(turns) or turns[index + 1]["role"] == "assistant":
            thinks = mode == "thinking" and index >= last_user
            parts += [Part(ASSISTANT, True), Part(THINK_START if thinks else THINK_END, True)]
    return [part for part in parts if part.text]


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
    if messages and messages[-1].get("role") == "assistant":
        raise BadInput("a prompt ends with a user (or system) message, not with the assistant's")


@lru_cache(maxsize=16)
def has_v4_layout(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a token for each mark of the V4 layout."""
    vocabulary = tokenizer.get_vocab()
    return all(token in vocabulary for token in LAYOUT_TOKENS)


@lru_cache(maxsize=16)
def _guarded_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], frozenset[int]]:
    """Tokens that text must not become: a pattern that matches (empty) where one is spelled, and their ids.

    Added tokens that are not special (runs of spaces in some vocabularies) stay text, except V4's own marks,
    which its published tokenizer does not flag as special.
    """
    guarded = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in SPECIAL_TOKENS
    }
    spelled = "|".join(re.escape(content) for content in guarded)
    # Unknown characters become the unknown token: that is no disguise.
    ids = frozenset(guarded.values()) - {tokenizer.unk_token_id}
    return re.compile(f"(?={spelled})" if spelled else r"(?!)"), ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise ordinary text: no special token comes out, however the text is spelled.

    Where the text spells a special token it is cut after that token's first character and the pieces are
    tokenised apart, which every tokenizer allows.

    Raises:
        BadInput: the text has a special token of a single character, which cannot be cut.
    """
    pattern, guarded_ids = _guarded_tokens(tokenizer)
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    ids: list[int] = []
    for start, end in pairwise(cuts):
        if start < end:
            ids += tokenizer.encode(text[start:end], add_special_tokens=False)
    if len(cuts) > 2 and not guarded_ids.isdisjoint(ids):
        token = next(tokenizer.convert_ids_to_tokens(i) for i in ids if i in guarded_ids)
        raise BadInput(f"the text contains the special token {token!r}, which this tokenizer cannot write as text")
    return ids


def _encode_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part]) -> list[int]:
    """Token ids of laid-out parts. Neighbouring texts (system after system) are tokenised as one."""
    ids: list[int] = []
    text = ""
    for part in parts:
        if not part.special:
            text += part.text
            continue
        if text:
            ids += encode_text(tokenizer, text)
            text = ""
        ids.append(tokenizer.convert_tokens_to_ids(part.text))
    return ids + encode_text(tokenizer, text) if text else ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], mode: Mode = "chat") -> list[int]:
    """Token ids of a prompt, up to where the answer (or the reasoning) begins.

    Raises:
        BadInput: the last message is the assistant's, a message is malformed, or the tokenizer's own chat template
            refuses the conversation.
    """
    _check_prompt(messages)
    if has_v4_layout(tokenizer):
        return _encode_parts(tokenizer, conversation_parts(messages, mode))
    _check_messages(messages, mode)
    if tokenizer.chat_template:
        return _encode_with_template(tokenizer, messages, mode)
    if mode == "thinking":
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
            enable_thinking=mode == "thinking",
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
        reasoning: in mode "thinking", what comes before `</think>`.

    Raises:
        BadInput: as `encode_prompt`; or mode "thinking" for a tokenizer without V4's tokens.
    """
    prompt_ids = encode_prompt(tokenizer, messages, mode)
    completion = [Part(answer, False)]
    if mode == "thinking":
        if not has_v4_layout(tokenizer):
            raise BadInput("reference answers in mode 'thinking' need a tokenizer with V4's tokens")
        completion = [Part(reasoning, False), Part(THINK_END, True), *completion]
    return prompt_ids, [*_encode_parts(tokenizer, completion), tokenizer.eos_token_id]


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a completion up to its EOS (or its end). Other special tokens stay visible in the text."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
