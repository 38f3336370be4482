"""What a model wrote, read back: reasoning, answer and tool calls, whole or cut off. Nothing here raises on a bad turn.

Everything works on sealed text (`posttrain.data.v4.text`): a tag counts as one only with the token `｜DSML｜` in it.
Between tags any white space will do; names, attributes and values are taken as they stand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.data.layout import DSML, EOS, THINK_END
from posttrain.data.v4.messages import Mode, ToolCall, check_mode, parse_json
from posttrain.data.v4.text import ANY_SEAL, SEALS, offset, unseal

_MARK = SEALS[DSML]
_TAG = re.compile(rf'<(?P<closes>/?){_MARK}(?P<name>[a-z_]+)(?P<attributes>(?:\s+[a-z]+="[^"\n]*")*)\s*>')
_TAG_BEGUN = re.compile(rf'(<(/?({_MARK}([a-z_]+((\s+[a-z]+="[^"\n]*")*(\s+([a-z]+(="?[^"\n]*"?)?)?)?)?)?)?)?)?')
"""What a tag looks like before its end has been written."""
_ATTRIBUTE = re.compile(r'([a-z]+)="([^"\n]*)"')
_SPACE = re.compile(r"\s*")
_SEAL = re.compile(ANY_SEAL)


@dataclass(frozen=True)
class FormatError:
    """Something that is not V4's format."""

    message: str
    position: int
    """Where in the turn's text (special tokens spelled out), in characters."""

    def __str__(self) -> str:
        return f"at character {self.position}: {self.message}"


@dataclass(frozen=True)
class ParsedTurn:
    """An assistant's turn, as far as it goes."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    """Those that could be read."""
    errors: tuple[FormatError, ...]
    """Empty for a turn in V4's format, and for the beginning of one."""
    phase: Literal["reasoning", "content", "tool_calls", "ended"]
    """What the text stops in; `ended`: its end token was there."""
    calls_tools: bool = False
    """A block of tool calls was begun, whether or not a call could be read."""

    def message(self) -> dict[str, Any]:
        """The turn as a message of a conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.message() for call in self.tool_calls]
        return message


class _Malformed(Exception):
    """Tool calls cannot be read any further."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def parse_turn(sealed: str, mode: Mode = "chat") -> ParsedTurn:
    """Read an assistant's turn: what comes after `<think>` (thinking efforts) or `</think>` (chat).

    Reading a growing prefix again and again shows a stream: calls appear when they are closed, and only what can not
    become right any more is an error.

    Args:
        sealed: Of `seal` or `seal_text`, with the end token if there was one.
    """
    check_mode(mode)
    text, end, after = sealed.partition(SEALS[EOS])
    ended = bool(end)
    errors: list[FormatError] = []
    if after:
        errors.append(FormatError("text after the end token", offset(sealed, len(text) + 1)))
    reasoning, start = "", 0
    if mode != "chat":
        thought = text.find(SEALS[THINK_END])
        if thought < 0:
            errors += _strangers(sealed, 0, len(text), "the reasoning")
            if ended:
                errors.append(FormatError("the reasoning is never closed by </think>", offset(sealed, len(text))))
            return ParsedTurn(unseal(text), "", (), tuple(errors), "ended" if ended else "reasoning")
        errors += _strangers(sealed, 0, thought, "the reasoning")
        reasoning, start = unseal(text[:thought]), thought + 1
    mark = text.find(_MARK, start)
    calls: list[ToolCall] = []
    stop = len(text)
    if mark >= 0:
        stop = max(start, mark - 2 if text[mark - 2 : mark] == "</" else mark - 1)
        errors += _read_calls(sealed, text, stop, ended, calls)
    errors += _strangers(sealed, start, stop, "the answer")
    content = text[start:stop].removesuffix("\n\n") if mark >= 0 else text[start:stop]
    phase: Literal["content", "tool_calls", "ended"] = "content" if mark < 0 else "tool_calls"
    errors.sort(key=lambda error: error.position)
    return ParsedTurn(reasoning, unseal(content), tuple(calls), tuple(errors), "ended" if ended else phase, mark >= 0)


def _strangers(sealed: str, start: int, stop: int, where: str) -> list[FormatError]:
    return [
        FormatError(f"{unseal(match.group())} in {where}", offset(sealed, match.start()))
        for match in _SEAL.finditer(sealed, start, stop)
    ]


def _read_calls(sealed: str, text: str, start: int, ended: bool, calls: list[ToolCall]) -> list[FormatError]:
    """Read the block that begins at `start`, adding to `calls`; returns what is wrong with it."""
    errors: list[FormatError] = []
    try:
        position = _Calls(text, ended, calls, errors).read(start)
        rest = _SPACE.match(text, position)
        if rest is not None and rest.end() < len(text):
            raise _Malformed("text after the tool calls", rest.end())
    except _Malformed as error:
        errors.append(FormatError(str(error), error.position))
    except EOFError:
        pass  # cut off: `phase` says so
    return [FormatError(error.message, offset(sealed, error.position)) for error in errors]


class _Calls:
    """Reads one block of tool calls. Positions are of the sealed text."""

    def __init__(self, text: str, ended: bool, calls: list[ToolCall], errors: list[FormatError]) -> None:
        self.text, self.ended, self.calls, self.errors = text, ended, calls, errors

    def read(self, position: int) -> int:
        """The position after the block. Raises _Malformed, or EOFError where text that may go on stops."""
        position = self._expect(position, "", "tool_calls").end()
        while True:
            tag = self._tag(position, 'an <｜DSML｜invoke name="..."> or </｜DSML｜tool_calls>')
            if tag["name"] == "tool_calls" and tag["closes"]:
                if not self.calls and not self.errors:
                    raise _Malformed("a block of tool calls without a call", tag.start())
                return tag.end()
            position = self._call(self._expect(tag.start(), "", "invoke", ("name",)))

    def _call(self, opening: re.Match[str]) -> int:
        name = dict(_ATTRIBUTE.findall(opening["attributes"]))["name"]
        arguments: dict[str, Any] = {}
        faults = len(self.errors)
        position = opening.end()
        while True:
            tag = self._tag(position, "a <｜DSML｜parameter ...> or </｜DSML｜invoke>")
            if tag["name"] == "invoke" and tag["closes"]:
                break
            position = self._parameter(self._expect(tag.start(), "", "parameter", ("name", "string")), name, arguments)
        if len(self.errors) == faults:
            self.calls.append(ToolCall(name, arguments))
        return tag.end()

    def _parameter(self, opening: re.Match[str], call: str, arguments: dict[str, Any]) -> int:
        attributes = dict(_ATTRIBUTE.findall(opening["attributes"]))
        name, kind = attributes["name"], attributes["string"]
        mark = self.text.find(_MARK, opening.end())
        if mark < 0:
            if not self.ended:
                raise EOFError
            raise _Malformed(f"the parameter {name!r} of {call} is never closed", opening.start())
        closing = self._expect(mark - 2, "/", "parameter")
        value = self.text[opening.end() : closing.start()]
        where = opening.end()
        if kind not in ("true", "false"):
            self.errors.append(FormatError(f'string="{kind}" is neither true nor false', opening.start()))
        elif name in arguments:
            self.errors.append(FormatError(f"the parameter {name!r} of {call} is there twice", opening.start()))
        elif kind == "true":
            arguments[name] = unseal(value)
        else:
            try:
                arguments[name] = parse_json(unseal(value))
            except ValueError as error:
                self.errors.append(FormatError(f"the parameter {name!r} of {call} is no JSON: {error}", where))
        return closing.end()

    def _tag(self, position: int, wanted: str) -> re.Match[str]:
        """The tag that begins at `position`, white space aside."""
        space = _SPACE.match(self.text, position)
        position = space.end() if space is not None else position
        tag = _TAG.match(self.text, position)
        if tag is None:
            if not self.ended and _TAG_BEGUN.fullmatch(self.text, position):
                raise EOFError
            raise _Malformed(f"expected {wanted}, found {_excerpt(self.text, position)}", position)
        return tag

    def _expect(self, position: int, closes: str, name: str, attributes: tuple[str, ...] = ()) -> re.Match[str]:
        """The tag at `position`, which must be this one with these attributes."""
        described = f"<{closes}{DSML}{name}" + "".join(f' {attribute}="..."' for attribute in attributes) + ">"
        tag = self._tag(position, described)
        given = tuple(attribute for attribute, _ in _ATTRIBUTE.findall(tag["attributes"]))
        if (tag["closes"], tag["name"], given) != (closes, name, attributes):
            raise _Malformed(f"expected {described}, found {_excerpt(self.text, position)}", position)
        return tag


def _excerpt(text: str, position: int) -> str:
    shown = unseal(text[position : position + 40])
    return repr(shown + "..." if len(text) > position + 40 else shown) if shown else "the end"
