"""Conversations as users write them, checked and brought into the turns that the format has.

V4 has no tool role: what tools returned opens the next user turn, in the order of the calls. Neighbouring user messages
are one turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from posttrain.data.layout import TASKS
from posttrain.data.v4.templates import RESULT_END, RESULT_START
from posttrain.data.v4.text import HALF_PAIR
from posttrain.errors import BadInput

Message = Mapping[str, Any]
"""`role` and `content` (text), and by role:

    system, developer   `tools`: OpenAI's `{"type": "function", "function": {"name": ..., "parameters": ...}}`;
                        `response_format`: a JSON schema that answers must have
    user, developer     `task`: the name of a quick instruction
    assistant           `reasoning` (or `reasoning_content`); `tool_calls`: OpenAI's
                        `{"id": ..., "function": {"name": ..., "arguments": JSON text or a mapping}}`; `task`: title
    tool                `tool_call_id`, if the calls have ids
"""
Mode = Literal["chat", "thinking", "thinking_max"]
"""The efforts of V4: non-think, think-high and think-max."""

MODES = ("chat", "thinking", "thinking_max")
ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
TASK_TOKENS = {token[2:-2]: token for token in TASKS}
_TOOL_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class ToolCall:
    """A call as the model made it: a name that need not exist, and arguments by name."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None

    def message(self) -> dict[str, Any]:
        """In OpenAI's form, `arguments` as JSON text."""
        function = {"name": self.name, "arguments": to_json(self.arguments)}
        return {"type": "function", "function": function}


@dataclass
class Turn:
    """One turn of the format."""

    role: str
    content: str
    reasoning: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The functions of the tools, without OpenAI's wrapping."""
    response_format: Any = None
    calls: tuple[ToolCall, ...] = ()
    results: list[tuple[int, str | None]] = field(default_factory=list)
    """Of a user turn: which of its `blocks` are results of tools, and of which call."""
    blocks: list[str] = field(default_factory=list)
    """Of a user turn: texts and results, in order."""
    task: str | None = None


def to_json(value: Any) -> str:
    """JSON as the format writes it: not escaped beyond need, a space after `,` and `:`."""
    return json.dumps(value, ensure_ascii=False)


def parse_json(text: str) -> Any:
    """The value of strict JSON (no NaN, no Infinity). Raises ValueError with what is wrong."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_mode(mode: str) -> None:
    """Raises BadInput unless `mode` is a `Mode`."""
    if mode not in MODES:
        raise BadInput(f"the mode is one of {', '.join(map(repr, MODES))}, not {mode!r}")


def check_conversation(messages: Sequence[Message], known_tools: Sequence[str] = ()) -> None:
    """Check a conversation without rendering it.

    Args:
        known_tools: Names of tools that may be called without being declared.

    Raises:
        BadInput: what is wrong with which message ("message 3: ..."), for a loader to put file and line in front:
            an unknown role, a missing or mistyped field, a call to a tool that is not declared before it, arguments
            that are no JSON object, a result without a call, a quick instruction where none can stand.
    """
    read_turns(messages, known_tools)


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation with tools declared in its first system message, which is put in front if there is none."""
    if not tools:
        return list(messages)
    if messages and messages[0].get("role") == "system":
        first, rest = messages[0], messages[1:]
    else:
        first, rest = {"role": "system", "content": ""}, messages
    return [{**first, "tools": [*(first.get("tools") or ()), *tools]}, *rest]


def read_turns(messages: Sequence[Message], known_tools: Sequence[str] = ()) -> list[Turn]:
    """The turns of a conversation; results of tools are in the order of the calls.

    Raises:
        BadInput: see `check_conversation`.
    """
    if not messages:
        raise BadInput("a conversation needs at least one message")
    turns: list[Turn] = []
    declared = set(known_tools)
    for index, message in enumerate(messages):
        try:
            _add_message(turns, message, declared, _role_after(messages, index))
        except ValueError as error:
            raise BadInput(f"message {index}: {error}") from None
    for calling, answering in pairwise(turns):
        if calling.calls and len(answering.results) > 1:
            _sort_results(calling, answering)
    return turns


def _role_after(messages: Sequence[Message], index: int) -> Any:
    following = messages[index + 1] if index + 1 < len(messages) else None
    return following.get("role") if isinstance(following, Mapping) else None


def _add_message(turns: list[Turn], message: Message, declared: set[str], next_role: Any) -> None:
    """Add one message to the turns. Raises ValueError with what is wrong with it."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is an object with `role` and `content`, not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"the role is one of {', '.join(ROLES)}, not {role!r}")
    task = _task(message, role, next_role)
    if role in ("user", "tool"):
        _add_to_user_turn(turns, message, role, task)
        return
    turn = Turn(role, _content(message, role), task=task)
    if role == "assistant":
        turn.reasoning = _reasoning(message)
        turn.calls = _calls(message, declared)
    elif role == "latest_reminder":
        if next_role not in ("user", "developer") or (turns and turns[-1].role in ("user", "developer")):
            raise ValueError("a latest_reminder stands directly before a user's turn")
    else:
        turn.tools = _tools(message, declared)
        declared.update(tool["name"] for tool in turn.tools)
        turn.response_format = message.get("response_format")
        _writable(_as_json(turn.response_format, "response_format"), "response_format")
    turns.append(turn)


def _add_to_user_turn(turns: list[Turn], message: Message, role: str, task: str | None) -> None:
    text = _content(message, role)
    continues = bool(turns) and turns[-1].role == "user"
    if role == "tool":
        calling = turns[-2 if continues else -1] if len(turns) > continues else None
        if calling is None or len(calling.calls) <= (len(turns[-1].results) if continues else 0):
            raise ValueError("a tool's result stands after the assistant's message that calls the tool")
        call_id = message.get("tool_call_id")
        known = [call.id for call in calling.calls if call.id]
        if call_id is not None and (not isinstance(call_id, str) or (known and call_id not in known)):
            raise ValueError(f"`tool_call_id` is one of {', '.join(known) or 'the calls'}, not {call_id!r}")
        text = f"{RESULT_START}{text}{RESULT_END}"
    if continues and task is not None:
        raise ValueError("a task in a user's turn of several messages is lost in V4's format: make them one message")
    if not continues:
        turns.append(Turn("user", "", task=task))
    if role == "tool":
        turns[-1].results.append((len(turns[-1].blocks), call_id))
    turns[-1].blocks.append(text)


def _sort_results(calling: Turn, answering: Turn) -> None:
    order: dict[str | None, int] = {call.id: position for position, call in enumerate(calling.calls) if call.id}
    ranked = sorted(answering.results, key=lambda result: order.get(result[1], 0))
    blocks = list(answering.blocks)
    for (place, _), (origin, _) in zip(answering.results, ranked, strict=True):
        answering.blocks[place] = blocks[origin]


def _content(message: Message, role: str) -> str:
    content = message.get("content")
    optional = {"assistant": ("tool_calls", "reasoning", "reasoning_content"), "system": ("tools",)}.get(role, ())
    if content is None and any(message.get(key) for key in optional):
        return ""
    if not isinstance(content, str):
        raise ValueError(f"`content` is text, not {type(content).__name__}" if content is not None else _missing(role))
    if role == "developer" and not content:
        raise ValueError("the `content` of a developer's message is not empty")
    return _writable(content, "content")


def _as_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None


def _missing(role: str) -> str:
    return "`content` is text, not NoneType: it is missing" + (
        " and there are no `tool_calls`" if role == "assistant" else ""
    )


def _writable(text: str, what: str) -> str:
    if HALF_PAIR.search(text):
        raise ValueError(f"`{what}` has half of a surrogate pair, which is no character")
    return text


def _reasoning(message: Message) -> str:
    given = [message[key] for key in ("reasoning", "reasoning_content") if message.get(key) is not None]
    if not all(isinstance(text, str) for text in given):
        raise ValueError("`reasoning` is text")
    if len(set(given)) > 1:
        raise ValueError("`reasoning` and `reasoning_content` are two names of one thing and differ")
    return _writable(given[0], "reasoning") if given else ""


def _task(message: Message, role: str, next_role: Any) -> str | None:
    task = message.get("task")
    if task is None:
        return None
    allowed = {"user": tuple(TASK_TOKENS), "developer": tuple(TASK_TOKENS), "assistant": ("title",)}.get(role, ())
    if task not in allowed:
        raise ValueError(f"the `task` of a message of role {role} is {' or '.join(allowed) or 'none'}, not {task!r}")
    if next_role not in (None, "assistant"):
        raise ValueError("a message with a `task` is the last one, or the assistant's output of the task follows")
    return task


def _tools(message: Message, declared: set[str]) -> tuple[Mapping[str, Any], ...]:
    tools = message.get("tools") or ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ValueError(f"`tools` is a list, not {type(tools).__name__}")
    functions: list[Mapping[str, Any]] = []
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise ValueError(
                f'tools[{index}] is {{"type": "function", "function": {{"name": ...}}}} with a name of letters, '
                "digits, `_`, `-` and `.`"
            )
        if name in declared or name in [other["name"] for other in functions]:
            raise ValueError(f"tools[{index}]: there already is a tool {name!r}")
        _writable(_as_json(function, f"tools[{index}]"), f"tools[{index}]")
        functions.append(function)
    return tuple(functions)


def _calls(message: Message, declared: set[str]) -> tuple[ToolCall, ...]:
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"`tool_calls` is a list, not {type(calls).__name__}")
    return tuple(_call(call, f"tool_calls[{index}]", declared) for index, call in enumerate(calls))


def _call(call: Any, where: str, declared: set[str]) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where} is {{"function": {{"name": ..., "arguments": ...}}}}')
    name = function["name"]
    if name not in declared:
        there_are = f"there are {', '.join(sorted(declared))}" if declared else "the conversation declares no `tools`"
        raise ValueError(f"{where}: there is no tool {name!r}; {there_are}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise ValueError(f"{where}: the `arguments` of {name} are no JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: the `arguments` of {name} are a JSON object")
    for key, value in arguments.items():
        if not isinstance(key, str) or not key or '"' in key or "\n" in key:
            raise ValueError(f"{where}: DSML cannot write a parameter of the name {key!r}")
        _writable(key + (value if isinstance(value, str) else _as_json(value, f"{where}.{key}")), where)
    call_id = call.get("id")
    if call_id is not None and not isinstance(call_id, str):
        raise ValueError(f"{where}: the `id` is text")
    return ToolCall(name, dict(arguments), call_id)
