"""Conversations to parts, as V4's published encoder lays them out.

BOS [max prefix] system [tools] [response format] <｜User｜> text <｜Assistant｜> </think> answer EOS        chat
BOS [max prefix] system ... <｜User｜> text <｜Assistant｜> <think> reasoning </think> answer [calls] EOS    thinking
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.data.layout import ASSISTANT, BOS, DSML, EOS, LATEST_REMINDER, THINK_END, THINK_START, USER
from posttrain.data.v4.messages import TASK_TOKENS, Message, Mode, ToolCall, Turn, check_mode, read_turns, to_json
from posttrain.data.v4.templates import MAX_PREFIX, RESPONSE_FORMAT, TOOLS_HEAD, TOOLS_TAIL
from posttrain.data.v4.text import Part, marked


def conversation_parts(messages: Sequence[Message], mode: Mode = "chat", known_tools: Sequence[str] = ()) -> list[Part]:
    """Lay a conversation out. After a last user or system message it opens the assistant's turn.

    Thinking efforts keep the reasoning of all turns if the conversation declares tools. Otherwise they drop what was
    reasoned before the last user message (and developer messages before it), as V4 does.

    Args:
        known_tools: Names of tools that are in play without being declared: what V4 is never shown, but saves a small
            model the thousand characters of a declaration.

    Raises:
        BadInput: an unknown mode, or a conversation that `check_conversation` refuses.
    """
    check_mode(mode)
    turns = read_turns(messages, known_tools)
    keeps = bool(known_tools) or any(turn.tools for turn in turns)
    if mode != "chat" and not keeps:
        last = _last_user(turns)
        turns = [turn for index, turn in enumerate(turns) if index >= last or turn.role != "developer"]
    last = _last_user(turns)
    parts = [Part(BOS, True)]
    if mode == "thinking_max":
        parts.append(Part(MAX_PREFIX, False))
    for index, turn in enumerate(turns):
        following = turns[index + 1].role if index + 1 < len(turns) else None
        answers_task = index > 0 and turns[index - 1].task is not None
        thinks = mode != "chat" and (keeps or index > last) and not answers_task
        learned = mode == "chat" or thinks or answers_task
        parts += [part._replace(by_model=part.by_model and learned) for part in _turn_parts(turn, thinks)]
        if following in (None, "assistant"):
            opens_thinking = mode != "chat" and (keeps or index >= last or turn.task == "action")
            parts += _transition(turn, opens_thinking)
    return [part for part in parts if part.text]


def continuation_parts(messages: Sequence[Message], mode: Mode = "chat") -> list[Part]:
    """What follows an assistant's EOS when a user or tools answer: their turn, and the opening of the next one.

    It continues the tokens of a conversation whose reasoning stays: one with tools, or in mode chat.

    Args:
        messages: Of roles tool and user; results in the order of the calls.
    """
    check_mode(mode)
    results = sum(message.get("role") == "tool" for message in messages)
    # Calls for the results to answer; they are not rendered.
    call = {"function": {"name": "any", "arguments": {}}}
    before = {"role": "assistant", "content": "", "tool_calls": [call] * results}
    turns = read_turns([before, *messages], ["any"])[1:]
    parts = [part for turn in turns for part in _turn_parts(turn, False)]
    return [part for part in [*parts, *_transition(turns[-1], mode != "chat")] if part.text]


def _last_user(turns: Sequence[Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _turn_parts(turn: Turn, thinks: bool) -> list[Part]:
    """A turn without what opens the next one. `thinks`: an assistant's turn shows its reasoning."""
    if turn.role == "assistant":
        parts = [Part(turn.reasoning, False, True), Part(THINK_END, True, True)] if thinks else []
        return [*parts, Part(turn.content, False, True), *call_parts(turn.calls), Part(EOS, True, True)]
    if turn.role == "user":
        return [Part(USER, True), Part("\n\n".join(turn.blocks), False)]
    if turn.role == "latest_reminder":
        return [Part(LATEST_REMINDER, True), Part(turn.content, False)]
    parts = [Part(USER, True)] if turn.role == "developer" else []
    parts.append(Part(turn.content, False))
    if turn.tools:
        parts += [Part("\n\n", False), *tools_parts(turn.tools)]
    if turn.response_format:
        parts.append(Part(f"\n\n{RESPONSE_FORMAT}{to_json(turn.response_format)}", False))
    return parts


def _transition(turn: Turn, thinks: bool) -> list[Part]:
    """What opens the turn after this one, which the assistant writes."""
    opening = [Part(ASSISTANT, True), Part(THINK_START if thinks else THINK_END, True)]
    if turn.task is not None:
        task = Part(TASK_TOKENS[turn.task], True)
        return [*opening, task] if turn.task == "action" else [task]
    return opening if turn.role in ("user", "developer", "system") else []


def tools_parts(functions: Sequence[Mapping[str, object]]) -> list[Part]:
    """The block that declares tools, one schema a line."""
    schemas = "\n".join(to_json(function) for function in functions)
    return [*marked(TOOLS_HEAD), Part(schemas + TOOLS_TAIL, False)]


def call_parts(calls: Sequence[ToolCall]) -> list[Part]:
    """Calls in DSML, as the model writes them after its text: strings as they are, everything else as JSON."""
    if not calls:
        return []
    mark = Part(DSML, True)
    parts = [Part("\n\n<", False), mark, Part("tool_calls>\n", False)]
    for call in calls:
        parts += [Part("<", False), mark, Part(f'invoke name="{call.name}">\n', False)]
        for position, (name, value) in enumerate(call.arguments.items()):
            is_text = isinstance(value, str)
            text = value if is_text else to_json(value)
            opening = f'parameter name="{name}" string="{str(is_text).lower()}">{text}</'
            parts += [Part("\n<" if position else "<", False), mark, Part(opening, False)]
            parts += [mark, Part("parameter>", False)]
        parts += [Part("\n</", False), mark, Part("invoke>\n", False)]
    parts += [Part("</", False), mark, Part("tool_calls>", False)]
    return [part._replace(by_model=True) for part in parts]
