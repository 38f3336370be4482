"""V4's whole format: tools, tool calls, efforts and quick instructions, against the reference encoder and back."""

from __future__ import annotations

from types import ModuleType

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posttrain.data.encoding import (
    decode_conversation,
    decode_turn,
    encode_continuation,
    encode_conversation,
    encode_prompt,
    render_conversation,
)
from posttrain.data.layout import ASSISTANT, BOS, DSML, EOS, SPECIAL_TOKENS, THINK_END, THINK_START, USER
from posttrain.data.tokenizer import CHARACTERS, build_character_tokenizer
from posttrain.data.v4 import (
    check_conversation,
    conversation_parts,
    parse_conversation,
    parse_turn,
    seal,
    seal_text,
    with_tools,
)
from posttrain.errors import BadInput
from tests.encoding_kit import WEATHER, as_kept, assistant_turns, conversations, load_reference, modes, reference_text

TOKENIZER = build_character_tokenizer()

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
disguised_text = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<", "</", "｜"]) | unicode_text, max_size=4).map("".join)
written_text = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<"]) | st.text(CHARACTERS, max_size=9), max_size=4).map(
    "".join
)

CALL = {"function": {"name": "get_weather", "arguments": "{}"}}
ASKED = [{"role": "system", "content": "", "tools": [WEATHER]}, {"role": "user", "content": "?"}]


def _call(**function):
    return {"function": {**CALL["function"], **function}}


def called(arguments: str) -> str:
    """A turn that calls get_weather with these parameters (DSML)."""
    return (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n{arguments}\n</{DSML}invoke>\n'
        f"</{DSML}tool_calls>{EOS}"
    )


def parameter(name: str, value: str, is_text: bool = True) -> str:
    return f'<{DSML}parameter name="{name}" string="{str(is_text).lower()}">{value}</{DSML}parameter>'


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load_reference()


def test_a_conversation_with_tools_word_for_word():
    call = {"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "Rome", "days": [1, 2]}'}}
    messages = [
        {"role": "system", "content": "Be brief.", "tools": [WEATHER]},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "reasoning_content": "Look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "dry"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "reasoning": "Tell.", "content": "No."},
    ]
    text = render_conversation(messages, "thinking_max")
    begin, _, rest = text.partition(f"{USER}Rain?")
    assert begin.startswith(f"{BOS}Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very")
    assert "left unchecked.\n\nBe brief.\n\n## Tools\n\nYou have access to a set of tools" in begin
    assert begin.endswith(
        '### Available Tool Schemas\n\n{"name": "get_weather", "description": "Look the weather up", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}\n\nYou MUST strictly '
        "follow the above defined tool name and parameter schemas to invoke tool calls.\n"
    )
    calls = called(f"{parameter('city', 'Rome')}\n{parameter('days', '[1, 2]', False)}")
    assert rest == (
        f"{ASSISTANT}{THINK_START}Look.{THINK_END}{calls}"
        f"{USER}<tool_result>dry</tool_result>\n\nAnd?{ASSISTANT}{THINK_START}Tell.{THINK_END}No.{EOS}"
    )


@settings(max_examples=400, deadline=None)
@given(messages=conversations(disguised_text), mode=modes)
def test_every_conversation_renders_as_the_reference_encoder_renders_it(reference, messages, mode):
    assert render_conversation(messages, mode) == reference_text(reference, messages, mode)


@settings(max_examples=400, deadline=None)
@given(messages=conversations(disguised_text), mode=modes)
def test_reading_back_a_layout_gives_the_conversation(messages, mode):
    assume(_keeps_all(messages, mode))
    back, found = parse_conversation(seal(conversation_parts(messages, mode)))
    assert back == as_kept(messages, mode)
    if mode == "thinking_max" or f"{ASSISTANT}{THINK_START}" in render_conversation(messages, mode):
        assert found == mode


@settings(max_examples=150, deadline=None)
@given(messages=conversations(written_text), mode=modes)
def test_tokens_there_and_back(messages, mode):
    assume(_keeps_all(messages, mode))
    encoded = encode_conversation(TOKENIZER, messages, mode)
    assert TOKENIZER.decode(encoded.token_ids) == render_conversation(messages, mode)
    assert decode_conversation(TOKENIZER, encoded.token_ids)[0] == as_kept(messages, mode)


@pytest.mark.parametrize(
    ("mode", "tools", "learned"),
    [
        ("chat", [], f"One.{EOS}Two.{EOS}"),
        ("thinking", [], f"Second.{THINK_END}Two.{EOS}"),
        ("thinking", [WEATHER], f"First.{THINK_END}One.{EOS}Second.{THINK_END}Two.{EOS}"),
        ("thinking_max", [WEATHER], f"First.{THINK_END}One.{EOS}Second.{THINK_END}Two.{EOS}"),
    ],
)
def test_the_loss_is_on_what_the_model_writes(mode, tools, learned):
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "One.", "reasoning": "First."},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "Two.", "reasoning": "Second."},
    ]
    ids, mask = encode_conversation(TOKENIZER, with_tools(messages, tools), mode)
    assert TOKENIZER.decode([token for token, own in zip(ids, mask, strict=True) if own]) == learned


def test_the_loss_is_on_calls_and_not_on_results():
    call = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    messages = [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "dry"}]
    ids, mask = encode_conversation(TOKENIZER, messages)
    written = TOKENIZER.decode([token for token, own in zip(ids, mask, strict=True) if own])
    assert written == called(parameter("city", "Rome"))


def _keeps_all(messages, mode):
    """Where a developer's message is dropped, the answer to it stays without an opening: it reads as a system text."""
    return len(as_kept(messages, mode)) == len(messages)


@settings(max_examples=40, deadline=None)
@given(messages=conversations(written_text, tasks=False), mode=modes)
def test_a_continuation_is_the_rest_of_the_conversation(messages, mode):
    """Turn by turn from the sampled tokens, and all at once from the messages: the same tokens."""
    messages = as_kept(with_tools(messages, [WEATHER]), mode)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for answer in answers:
        following = messages[answer + 1 :]
        count = next((i for i, m in enumerate(following) if m["role"] not in ("user", "tool")), len(following))
        if count == 0 or (count < len(following) and following[count]["role"] != "assistant"):
            continue
        upto = answer + 1 + count
        before = encode_conversation(TOKENIZER, messages[: answer + 1], mode).token_ids
        continued = before + encode_continuation(TOKENIZER, messages[answer + 1 : upto], mode)
        assert continued == encode_prompt(TOKENIZER, messages[:upto], mode)


def test_results_go_to_the_order_of_the_calls():
    calls = [{"id": name, "function": {"name": "get_weather", "arguments": {}}} for name in "abc"]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in "cab"]
    messages = [
        {"role": "system", "content": "", "tools": [WEATHER]},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *results[:2],
        {"role": "user", "content": "between"},
        results[2],
    ]
    expected = "<tool_result>a</tool_result>\n\n<tool_result>b</tool_result>\n\nbetween\n\n<tool_result>c</tool_result>"
    assert render_conversation(messages).endswith(f"{USER}{expected}{ASSISTANT}{THINK_END}")


# Reading turns


def test_a_turn_with_calls_is_read():
    arguments = "\n".join(
        [
            parameter("city", 'a "b" </c>\n{}'),
            parameter("days", "[1, 2.5, null]", False),
            parameter("hourly", "true", False),
        ]
    )
    turn = parse_turn(seal_text(f"I look.{THINK_END}Wait.{called(arguments)}"), "thinking")
    assert (turn.reasoning, turn.content, turn.errors, turn.phase) == ("I look.", "Wait.", (), "ended")
    assert turn.tool_calls[0].name == "get_weather"
    assert turn.tool_calls[0].arguments == {"city": 'a "b" </c>\n{}', "days": [1, 2.5, None], "hourly": True}


@pytest.mark.parametrize(
    ("text", "mode", "position", "complaint"),
    [
        (f"a{USER}b{EOS}", "chat", 1, "<｜User｜> in the answer"),
        (f"a{EOS}b", "chat", 1 + len(EOS), "text after the end token"),
        (f"thought{EOS}", "thinking", 7, "the reasoning is never closed by </think>"),
        (f"a{THINK_START}b{THINK_END}c{EOS}", "thinking", 1, "<think> in the reasoning"),
        (f"a{called('')}b", "chat", len(f"a{called('')}"), "text after the end token"),
        (called(parameter("n", "1,", False)), "chat", None, "the parameter 'n' of get_weather is no JSON: Extra data"),
        (called(parameter("n", "NaN", False)), "chat", None, "no JSON: NaN is no JSON value"),
        (called(parameter("n", "[" * 100_000, False)), "chat", None, "no JSON: nested too deeply"),
        (called(parameter("n", "1" * 5000, False)), "chat", None, "no JSON: Exceeds the limit"),
        (called(2 * parameter("n", "1")), "chat", None, "the parameter 'n' of get_weather is there twice"),
        (called(parameter("n", "1").replace("true", "yes")), "chat", None, 'string="yes" is neither true nor false'),
        (called("hello"), "chat", None, "expected a <｜DSML｜parameter ...> or </｜DSML｜invoke>, found 'hello"),
        (called("").replace('"get_weather"', "get_weather"), "chat", 21, "expected an <｜DSML｜invoke name="),
        (called("").replace("name=", "id="), "chat", 21, "expected <｜DSML｜invoke name="),
        (f"\n\n<{DSML}tool_calls>\n</{DSML}tool_calls>{EOS}", "chat", 21, "a block of tool calls without a call"),
        (f"\n\n<{DSML}tool_calls>\n<{DSML}invoke{EOS}", "chat", 21, "expected an <｜DSML｜invoke name="),
        (
            called(parameter("n", "1").removesuffix(f"</{DSML}parameter>")),
            "chat",
            None,
            "expected </｜DSML｜parameter>",
        ),
        (f"x<{DSML}invoke>{EOS}", "chat", 1, "expected <｜DSML｜tool_calls>"),
        (f"x{DSML}{EOS}", "chat", 0, "expected <｜DSML｜tool_calls>, found 'x｜DSML｜'"),
    ],
)
def test_what_is_wrong_with_a_turn_is_said_with_its_position(text, mode, position, complaint):
    turn = parse_turn(seal_text(text), mode)
    assert turn.errors and complaint in str(turn.errors[0])
    assert position is None or turn.errors[0].position == position
    assert not turn.tool_calls or "after the end" in str(turn.errors[0])


def test_a_broken_call_does_not_hide_the_others():
    block = called(parameter("days", "one", False))
    second = f'<{DSML}invoke name="get_weather">\n{parameter("city", "Rome")}\n</{DSML}invoke>\n</{DSML}tool_calls>'
    turn = parse_turn(seal_text(block.replace(f"</{DSML}tool_calls>", second)))
    assert [call.arguments for call in turn.tool_calls] == [{"city": "Rome"}]
    assert len(turn.errors) == 1 and "'days'" in str(turn.errors[0])


@settings(max_examples=200, deadline=None)
@given(turn=assistant_turns(st.text(CHARACTERS.replace("｜", ""), max_size=9)), mode=modes, cut=st.floats(0, 1))
def test_the_beginning_of_a_good_turn_is_never_wrong(turn, mode, cut):
    ids, mask = encode_conversation(TOKENIZER, [*ASKED, turn], mode)
    own = [token for token, learned in zip(ids, mask, strict=True) if learned]
    whole, part = decode_turn(TOKENIZER, own, mode), decode_turn(TOKENIZER, own[: int(cut * len(own))], mode)
    assert whole.errors == part.errors == ()
    assert whole.tool_calls[: len(part.tool_calls)] == part.tool_calls
    assert whole.reasoning.startswith(part.reasoning) and whole.phase == "ended"
    assert whole.message() == as_kept([*ASKED, turn], mode)[-1]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60), mode=modes)
def test_any_tokens_can_be_read_as_a_turn(ids, mode):
    turn = decode_turn(TOKENIZER, ids, mode)
    assert (turn.phase == "ended") == (TOKENIZER.eos_token_id in ids)


PIECES = (
    *(DSML, "<", "</", ">", "1", THINK_END, EOS),
    *(f"\n\n<{DSML}tool_calls>\n", f'<{DSML}invoke name="f">\n', f'<{DSML}parameter name="x" string="true">'),
    *(f"</{DSML}parameter>", f"</{DSML}invoke>\n", f"</{DSML}tool_calls>"),
)


@settings(max_examples=500, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join), mode=modes)
def test_any_markup_can_be_read_as_a_turn(text, mode):
    turn = parse_turn(seal_text(text), mode)
    assert turn.phase == "ended" or EOS not in text
    assert all(0 <= error.position <= len(text) for error in turn.errors)
    assert turn.tool_calls or turn.errors or turn.phase in ("reasoning", "tool_calls") or DSML not in text


def test_markup_that_is_spelled_and_not_a_token_is_text():
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": called(parameter("city", "Rome"))}]
    ids = encode_conversation(TOKENIZER, messages).token_ids
    turn = decode_turn(TOKENIZER, ids[ids.index(TOKENIZER.convert_tokens_to_ids(THINK_END)) + 1 :])
    assert turn.tool_calls == () and turn.errors == () and turn.content == messages[1]["content"]


def test_a_layout_that_is_none_is_bad_input():
    for text, complaint in [
        ("a", "at character 0: a conversation begins with"),
        (f"{BOS}a{EOS}", f"at character {len(BOS) + 1}: {EOS} cannot stand here"),
        (f"{BOS}{USER}a{ASSISTANT}b", "expected <think> or </think> after"),
        (f"{BOS}{USER}a{ASSISTANT}{THINK_END}{called('x')}", "expected a <｜DSML｜parameter"),
        (f"{BOS}{USER}a{THINK_END}b", "a special token in the text"),
    ]:
        with pytest.raises(BadInput, match=complaint.replace("|", "\\|")):
            parse_conversation(seal_text(text))


# Bad conversations


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (["hello"], "message 0: a message is an object with `role` and `content`, not str"),
        ([{"content": "a"}], "message 0: the role is one of system, user, .*, not None"),
        ([{"role": "user"}], "message 0: `content` is text, not NoneType: it is missing"),
        ([{"role": "user", "content": ["a"]}], "message 0: `content` is text, not list"),
        ([*ASKED, {"role": "assistant"}], "message 2: `content` is .* missing and there are no `tool_calls`"),
        ([*ASKED, {"role": "assistant", "content": "", "reasoning": 1}], "message 2: `reasoning` is text"),
        (
            [*ASKED, {"role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "b"}],
            "two names of one thing and differ",
        ),
        (
            [*ASKED, {"role": "assistant", "tool_calls": [_call(name="fly")]}],
            r"message 2: tool_calls\[0\]: there is no tool 'fly'; there are get_weather",
        ),
        ([{"role": "assistant", "tool_calls": [CALL]}], "there is no tool 'get_weather'; the conversation declares no"),
        (
            [*ASKED, {"role": "assistant", "tool_calls": [_call(arguments="{")]}],
            "the `arguments` of get_weather are no JSON: Expecting property name",
        ),
        (
            [*ASKED, {"role": "assistant", "tool_calls": [_call(arguments="[]")]}],
            "the `arguments` of get_weather are a JSON object",
        ),
        (
            [*ASKED, {"role": "assistant", "tool_calls": [_call(arguments=None)]}],
            "the `arguments` of get_weather are a JSON object",
        ),
        (
            [*ASKED, {"role": "assistant", "tool_calls": [_call(arguments={'"': 1})]}],
            "DSML cannot write a parameter of the name",
        ),
        ([*ASKED, {"role": "assistant", "tool_calls": ["x"]}], r"tool_calls\[0\] is \{\"function\""),
        ([*ASKED, {"role": "assistant", "tool_calls": "x"}], "`tool_calls` is a list, not str"),
        ([*ASKED, {"role": "tool", "content": "a"}], "message 2: a tool's result stands after"),
        (
            [*ASKED, {"role": "assistant", "tool_calls": [CALL]}, *[{"role": "tool", "content": "a"}] * 2],
            "message 4: a tool's result stands after",
        ),
        (
            [
                *ASKED,
                {"role": "assistant", "tool_calls": [{**CALL, "id": "1"}]},
                {"role": "tool", "content": "a", "tool_call_id": "2"},
            ],
            "message 3: `tool_call_id` is one of 1, not '2'",
        ),
        ([{"role": "system", "content": "", "tools": "get_weather"}], "message 0: `tools` is a list, not str"),
        ([{"role": "system", "content": "", "tools": [{"name": "a"}]}], r"message 0: tools\[0\] is"),
        ([{"role": "system", "content": "", "tools": [WEATHER, WEATHER]}], "there already is a tool 'get_weather'"),
        ([{"role": "developer", "content": ""}], "message 0: the `content` of a developer's message is not empty"),
        ([{"role": "user", "content": "a", "task": "sing"}], "the `task` of a message of role user is action"),
        ([{"role": "system", "content": "a", "task": "title"}], "the `task` of a message of role system is none"),
        ([{"role": "user", "content": "a", "task": "query"}, ASKED[1]], "a message with a `task` is the last one"),
        ([ASKED[1], {**ASKED[1], "task": "query"}], "message 1: a task in a user's turn of several messages is lost"),
        ([{"role": "latest_reminder", "content": "a"}], "message 0: a latest_reminder stands directly before"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_conversation_is_said_with_the_message(messages, complaint):
    with pytest.raises(BadInput, match=complaint):
        check_conversation(messages)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["tool", "user", "a"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["function", "name", "arguments", "id", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "latest_reminder"])
any_message = st.fixed_dictionaries(
    {"role": roles | anything, "content": st.text(max_size=4) | anything},
    optional={
        "tools": st.just([WEATHER]) | anything,
        "tool_calls": st.lists(st.just(CALL) | anything, max_size=2) | anything,
        **dict.fromkeys(["reasoning", "response_format", "tool_call_id"], anything),
        "task": st.sampled_from(["action", "title"]) | anything,
    },
)


@settings(max_examples=600, deadline=None)
@given(messages=st.lists(any_message | anything, max_size=4), mode=modes)
def test_any_data_is_a_conversation_or_bad_input(messages, mode):
    try:
        parts = conversation_parts(messages, mode)
    except BadInput as error:
        assert "message" in str(error)
    else:
        assert parts[0].text == BOS
        seal(parts).encode("utf-8", "surrogatepass")
