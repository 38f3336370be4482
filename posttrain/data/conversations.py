"""Conversations from JSONL files, for supervised training: several turns, tools, efforts.

One JSON object a line, with either of

    {"messages": [...], "tools": [...], "mode": "thinking"}    OpenAI's; `tools` and `mode` may be missing
    {"text": "<｜begin▁of▁sentence｜>..."}                      V4's layout; every spelled special token is one
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.v4 import Message, Mode, check_conversation, parse_conversation, seal_text, with_tools
from posttrain.data.v4.messages import check_mode
from posttrain.errors import BadInput

SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Conversation:
    """A conversation that was checked, with an assistant's message to learn."""

    where: str
    """`file:line`, and the row's `id` if it has one."""
    messages: tuple[Message, ...]
    mode: Mode


@dataclass(frozen=True)
class ConversationFile:
    """What a file holds."""

    conversations: list[Conversation]
    dropped: list[str]
    """Of every row that was left out: where it is and what is wrong with it."""


def read_conversations(
    path: str | Path,
    key: str,
    drop_bad: bool = False,
    known_tools: Sequence[str] = (),
    complaint: Callable[[Conversation], str | None] = lambda conversation: None,
) -> ConversationFile:
    """Read a JSONL file of conversations.

    Args:
        key: The recipe's key that names the file, for messages.
        drop_bad: Leave out rows that are wrong, instead of refusing the file.
        known_tools: Names of tools that may be called without being declared.
        complaint: What else is wrong with a conversation, if anything.

    Raises:
        BadInput: no such file, no good row, or (unless `drop_bad`) bad rows: the first few, by file and line.
    """
    if not Path(path).is_file():
        raise BadInput(f"{key}: there is no file {str(path)!r} (looked in {Path.cwd()})")
    good: list[Conversation] = []
    bad: list[str] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        where = f"{path}:{number}"
        try:
            if line.strip():
                conversation = _parse_row(line, where, known_tools)
                if wrong := complaint(conversation):
                    raise ValueError(wrong)
                good.append(conversation)
        except (BadInput, ValueError) as error:
            bad.append(f"{where}: {error}")
    if bad and not drop_bad:
        more = f"\n  (and {len(bad) - SHOWN_ERRORS} more)" if len(bad) > SHOWN_ERRORS else ""
        raise BadInput(f"{key} has bad rows:\n  " + "\n  ".join(bad[:SHOWN_ERRORS]) + more)
    if not good:
        what = f"no good row; the first bad one is {bad[0]}" if bad else "no row"
        raise BadInput(f"{key}: {str(path)!r} holds {what}")
    return ConversationFile(good, bad)


def _parse_row(line: bytes, where: str, known_tools: Sequence[str]) -> Conversation:
    """Raises ValueError or BadInput with what is wrong."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, Mapping) or ("messages" in row) == ("text" in row):
        raise ValueError("a row is an object with either `messages` or `text`")
    messages, mode = _parse_text(row) if "text" in row else _parse_messages(row)
    check_conversation(messages, known_tools)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant's message to learn")
    return Conversation(f"{where} ({row['id']})" if "id" in row else where, tuple(messages), mode)


def _parse_text(row: Mapping[str, Any]) -> tuple[list[Message], Mode]:
    if not isinstance(row["text"], str):
        raise ValueError(f"`text` is text, not {type(row['text']).__name__}")
    messages, mode = parse_conversation(seal_text(row["text"]))
    return [*messages], mode


def _parse_messages(row: Mapping[str, Any]) -> tuple[list[Message], Mode]:
    messages, tools, mode = row["messages"], row.get("tools") or [], row.get("mode", "chat")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError("`messages` is a list of objects")
    if not isinstance(tools, list):
        raise ValueError("`tools` is a list")
    check_mode(mode)
    return with_tools(messages, tools), mode
