"""Whole conversations, read back from their layout: the inverse of `conversation_parts`."""

from __future__ import annotations

import re
from typing import Any

from posttrain.data.layout import ASSISTANT, BOS, EOS, LATEST_REMINDER, TASKS, THINK_END, THINK_START, USER
from posttrain.data.v4.messages import TASK_TOKENS, Mode, parse_json
from posttrain.data.v4.parse import parse_turn
from posttrain.data.v4.templates import MAX_PREFIX, RESPONSE_FORMAT, RESULT_END, RESULT_START, TOOLS_HEAD, TOOLS_TAIL
from posttrain.data.v4.text import SEALS, offset, seal_text, unseal
from posttrain.errors import BadInput

_BOUNDARIES = "".join(SEALS[token] for token in (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, *TASKS))
_SEGMENT = re.compile(f"[^{_BOUNDARIES}]*")
_TASK_NAMES = {SEALS[token]: name for name, token in TASK_TOKENS.items()}
_RESULT = re.compile(f"{RESULT_START}(.*?){RESULT_END}(?=\n\n|$)", re.DOTALL)
_SEALED_HEAD = "\n\n" + seal_text(TOOLS_HEAD)


def parse_conversation(sealed: str) -> tuple[list[dict[str, Any]], Mode]:
    """The messages of a conversation and its effort.

    What the layout does not hold does not come back: ids of calls, reasoning that was dropped, the seams between
    neighbouring user messages. A developer's message without tools and response format comes back as a user's.

    Raises:
        BadInput: not a conversation in V4's layout, with the position.
    """
    return _Reader(sealed).read()


class _Reader:
    def __init__(self, sealed: str) -> None:
        self.sealed = sealed
        self.position = 0
        self.messages: list[dict[str, Any]] = []
        self.thinks = False

    def read(self) -> tuple[list[dict[str, Any]], Mode]:
        if not self._take(SEALS[BOS]):
            raise self._wrong(f"a conversation begins with {BOS}")
        at_most = self._take(MAX_PREFIX)
        while self.position < len(self.sealed):
            self._item()
        return self.messages, "thinking_max" if at_most else "thinking" if self.thinks else "chat"

    def _item(self) -> None:
        if self._take(SEALS[USER]):
            self._user(self._segment())
        elif self._take(SEALS[LATEST_REMINDER]):
            self.messages.append({"role": "latest_reminder", "content": self._plain(self._segment())})
        elif self._take(SEALS[ASSISTANT]):
            thinks = self._take(SEALS[THINK_START])
            if not thinks and not self._take(SEALS[THINK_END]):
                raise self._wrong(f"expected {THINK_START} or {THINK_END} after {ASSISTANT}")
            self.thinks = self.thinks or thinks
            is_task = self._task()
            self._assistant(thinks and not is_task)
        elif self._task():
            self._assistant(False)
        elif self.sealed[self.position] in _BOUNDARIES:
            raise self._wrong(f"{unseal(self.sealed[self.position])} cannot stand here")
        else:
            self.messages.append({"role": "system", **self._declarations(self._segment())})

    def _task(self) -> bool:
        """Take a quick instruction, which belongs to the message before it."""
        name = _TASK_NAMES.get(self.sealed[self.position : self.position + 1])
        if name is None:
            return False
        if not self.messages:
            raise self._wrong("a quick instruction without a message before it")
        self.messages[-1]["task"] = name
        self.position += 1
        return True

    def _assistant(self, thinks: bool) -> None:
        start = self.position
        if start == len(self.sealed):
            return  # a prompt: the turn is open
        end = self.sealed.find(SEALS[EOS], start)
        self.position = end + 1 if end >= 0 else len(self.sealed)
        turn = parse_turn(self.sealed[start : self.position], "thinking" if thinks else "chat")
        if turn.errors:
            raise BadInput(
                f"at character {offset(self.sealed, start) + turn.errors[0].position}: {turn.errors[0].message}"
            )
        self.messages.append(turn.message())

    def _user(self, text: str) -> None:
        declared = self._declarations(text)
        if len(declared) > 1:
            self.messages.append({"role": "developer", **declared})
            return
        calls = len(self.messages[-1].get("tool_calls", ())) if self.messages else 0
        position = 0
        for _ in range(calls):
            result = _RESULT.match(text, position)
            if result is None:
                break
            self.messages.append({"role": "tool", "content": self._plain(result[1])})
            position = result.end()
            if position == len(text):
                return
            position += len("\n\n")
        self.messages.append({"role": "user", "content": self._plain(text[position:])})

    def _declarations(self, text: str) -> dict[str, Any]:
        """The content of a system's or developer's message, and its tools and response format if it has any."""
        found: dict[str, Any] = {}
        content, head, schemas = text.partition(_SEALED_HEAD)
        rest = content
        if head:
            schemas, _, rest = schemas.partition(TOOLS_TAIL)
            functions = [self._json(line, "a tool's schema") for line in schemas.split("\n")]
            found["tools"] = [{"type": "function", "function": function} for function in functions]
        before, format_head, schema = rest.rpartition("\n\n" + RESPONSE_FORMAT)
        if format_head:
            found["response_format"] = self._json(schema, "the response format")
            content = content if head else before
        return {"content": self._plain(content), **found}

    def _json(self, text: str, what: str) -> Any:
        try:
            return parse_json(unseal(text))
        except ValueError as error:
            raise self._wrong(f"{what} is no JSON: {error}") from None

    def _plain(self, text: str) -> str:
        if any(seal in text for seal in SEALS.values()):
            raise self._wrong(f"a special token in the text {unseal(text)[:60]!r}")
        return text

    def _take(self, expected: str) -> bool:
        if not self.sealed.startswith(expected, self.position):
            return False
        self.position += len(expected)
        return True

    def _segment(self) -> str:
        match = _SEGMENT.match(self.sealed, self.position)
        text = match.group() if match is not None else ""
        self.position += len(text)
        return text

    def _wrong(self, message: str) -> BadInput:
        return BadInput(f"at character {offset(self.sealed, self.position)}: {message}")
