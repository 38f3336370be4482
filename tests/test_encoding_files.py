"""Files of conversations: what is read, and how a bad row is named."""

from __future__ import annotations

import json

import pytest

from posttrain.data.conversations import read_conversations
from posttrain.data.encoding import render_conversation
from posttrain.errors import BadInput
from tests.encoding_kit import WEATHER

CALL = {"function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
ASKED = {"role": "user", "content": "Rain?"}
TALK = [ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "dry"}]
TALK += [{"role": "assistant", "content": "No.", "reasoning": "Dry."}]


def write(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_messages_and_v4s_own_text_are_the_same_conversation(tmp_path):
    row = {"id": "a", "messages": TALK, "tools": [WEATHER], "mode": "thinking"}
    first = read_conversations(write(tmp_path / "a.jsonl", row), "data").conversations[0]
    text = render_conversation(first.messages, first.mode)
    second = read_conversations(write(tmp_path / "b.jsonl", b"", {"text": text}), "data").conversations[0]
    assert render_conversation(second.messages, second.mode) == text and "<think>Dry.</think>No." in text
    assert (first.where, second.where) == (f"{tmp_path}/a.jsonl:1 (a)", f"{tmp_path}/b.jsonl:2")


BROKEN_DSML = "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜></think>b\n\n<｜DSML｜tool_calls>c<｜end▁of▁sentence｜>"

BAD_ROWS = [
    (b'{"messages": [', "not JSON: Expecting value"),
    (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
    ([], "a row is an object with either `messages` or `text`"),
    ({"prompt": "a"}, "a row is an object with either `messages` or `text`"),
    ({"messages": [], "text": ""}, "a row is an object with either `messages` or `text`"),
    ({"messages": "a"}, "`messages` is a list of objects"),
    ({"messages": []}, "a conversation needs at least one message"),
    ({"messages": [ASKED], "tools": {"a": 1}}, "`tools` is a list"),
    ({"messages": [ASKED], "mode": "deep"}, "the mode is one of 'chat', 'thinking', 'thinking_max', not 'deep'"),
    ({"messages": [ASKED]}, "there is no assistant's message to learn"),
    ({"messages": [ASKED, {"role": "robot", "content": "a"}]}, "message 1: the role is one of system, user"),
    ({"messages": [ASKED, {"role": "assistant"}]}, "message 1: `content` is text, not NoneType: it is missing"),
    ({"messages": TALK}, "message 1: tool_calls[0]: there is no tool 'get_weather'; the conversation declares no"),
    ({"text": 1}, "`text` is text, not int"),
    ({"text": "hello"}, "at character 0: a conversation begins with <｜begin▁of▁sentence｜>"),
    ({"text": BROKEN_DSML}, f"at character {BROKEN_DSML.rindex('c<')}: expected an <｜DSML｜invoke name="),
]


@pytest.mark.parametrize(("row", "complaint"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, complaint):
    path = write(tmp_path / "bad.jsonl", {"messages": TALK, "tools": [WEATHER]}, row)
    with pytest.raises(BadInput) as raised:
        read_conversations(path, "stages.sft.data")
    assert str(raised.value).startswith(f"stages.sft.data has bad rows:\n  {path}:2: {complaint}")


def test_bad_rows_are_dropped_and_counted_if_that_is_wanted(tmp_path):
    path = write(tmp_path / "bad.jsonl", *(row for row, _ in BAD_ROWS), {"messages": TALK, "tools": [WEATHER]})
    found = read_conversations(path, "data", drop_bad=True)
    assert len(found.conversations) == 1 and len(found.dropped) == len(BAD_ROWS)
    with pytest.raises(BadInput, match=rf"\(and {len(BAD_ROWS) - 5} more\)$"):
        read_conversations(path, "data")


def test_a_file_without_a_good_row_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="data: there is no file"):
        read_conversations(tmp_path / "none.jsonl", "data")
    with pytest.raises(BadInput, match="holds no row"):
        read_conversations(write(tmp_path / "empty.jsonl", b""), "data")
    with pytest.raises(BadInput, match=r"holds no good row; the first bad one is .*bad.jsonl:1: not JSON"):
        read_conversations(write(tmp_path / "bad.jsonl", b"{"), "data", drop_bad=True)
