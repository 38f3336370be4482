"""Tools as the model sees them, and what comes back from its calls."""

from __future__ import annotations

import ast
import contextlib
import sys
import time
from dataclasses import replace
from fractions import Fraction
from threading import Event
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.calculations import demonstrate, demonstrate_half, generate_calculations
from posttrain.data.encoding import check_conversation
from posttrain.data.v4 import ToolCall, parse_turn, seal_text, with_tools
from posttrain.errors import BadInput
from rollouts.environments import SingleTurn, ToolError, ToolUse, calculator, function_tool, schema_tool

QUESTION = [{"role": "user", "content": "?"}]


def forecast(city: str, days: int = 1, unit: Literal["C", "F"] = "C", hours: list[int] | None = None) -> Any:
    """Look the weather up.

    It may be wrong.

    Args:
        city: Its name,
            in English.
        days (int): How many.

    Returns:
        Words.
    """
    if city == "Atlantis":
        raise LookupError("it has sunk")
    return {"city": city, "days": days, "unit": unit, "hours": hours}


def turn_that_calls(*calls: ToolCall) -> Any:
    from posttrain.data.v4.render import call_parts
    from posttrain.data.v4.text import seal

    return parse_turn(seal(call_parts(calls)) + seal_text("<｜end▁of▁sentence｜>"))


def test_a_function_becomes_a_tool():
    assert function_tool(forecast).schema() == {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "Look the weather up.\n\nIt may be wrong.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name, in English."},
                    "days": {"type": "integer", "description": "How many."},
                    "unit": {"enum": ["C", "F"]},
                    "hours": {"type": ["array", "null"], "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
        },
    }


def test_a_schema_and_a_function_are_a_tool():
    tool = schema_tool(function_tool(forecast).schema(), forecast)
    assert tool == function_tool(forecast)
    assert tool.run(ToolCall("forecast", {"city": "Rome"})) == (
        '{"city": "Rome", "days": 1, "unit": "C", "hours": null}'
    )
    bare = schema_tool({"type": "function", "function": {"name": "now"}}, lambda: {1, 2} - {2})
    assert bare.run(ToolCall("now", {})) == "{1}"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "forecast needs the parameter 'city'"),
        ({"city": 3}, "'city' is of type string, not 3"),
        ({"city": "Rome", "days": True}, "'days' is of type integer, not true"),
        ({"city": "Rome", "days": "2"}, "'days' is of type integer, not \"2\""),
        ({"city": "Rome", "unit": "K"}, '\'unit\' is one of "C", "F", not "K"'),
        ({"city": "Rome", "hours": 1}, "'hours' is of type array or null, not 1"),
        ({"city": "Rome", "when": 1}, "forecast has no parameter 'when'; it takes city, days, unit, hours"),
        ({"city": "Atlantis"}, "LookupError: it has sunk"),
    ],
)
def test_a_call_that_cannot_be_carried_out_says_why(arguments, complaint):
    with pytest.raises(ToolError) as raised:
        function_tool(forecast).run(ToolCall("forecast", arguments))
    assert str(raised.value) == complaint


def test_a_call_that_does_not_come_back_is_an_error_for_the_model_and_holds_nobody_up():
    released = Event()

    def wait(answer: str) -> str:
        """Wait."""
        released.wait()
        return answer

    tool = replace(function_tool(wait), seconds=0.2)
    began = time.monotonic()
    observation = ToolUse(QUESTION, [tool]).step(turn_that_calls(ToolCall("wait", {"answer": "late"})))
    assert time.monotonic() - began < 5
    released.set()
    assert [message["content"] for message in observation.messages] == ["Error: wait took longer than 0.2 s"]
    assert observation.tool_errors == 1


def test_a_tool_that_ends_its_thread_ends_no_more_than_that():
    def leave() -> str:
        """Leave."""
        sys.exit("enough")

    with pytest.raises(ToolError, match="SystemExit: enough"):
        function_tool(leave).run(ToolCall("leave", {}))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: function_tool(lambda x: x), "the parameter 'x' of the tool <lambda> has no type hint"),
        (lambda: function_tool(_variadic), "the parameter 'numbers' of the tool _variadic cannot be passed by name"),
        (lambda: function_tool(_bytes), "has the type <class 'bytes'>; a tool takes str, int"),
        (lambda: schema_tool({"name": "f"}, print), "a tool's schema is"),
        (lambda: schema_tool(_schema(type="array"), print), "tool f: `parameters` is a JSON schema of type object"),
        (lambda: schema_tool(_schema(properties={"a": {"type": "text"}}), print), "'a' has the type 'text'; JSON has"),
    ],
)
def test_what_is_no_tool_is_bad_input(make, complaint):
    with pytest.raises(BadInput) as raised:
        make()
    assert complaint in str(raised.value)


def _variadic(*numbers: int) -> int:
    return sum(numbers)


def _bytes(data: bytes) -> int:
    return len(data)


def _schema(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


# The calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48213*9377", "452093301"),
        ("(12 + 30) * -2", "-84"),
        ("1/4", "0.25"),
        ("-1/8", "-0.125"),
        ("1/3", "1/3"),
        ("0.1 + 0.2", "0.3"),
        ("0.12345678901234567890 * 10**20", "12345678901234567890"),
        ("7 // 2 + 7 % 2 - -7 // 2", "8"),
        ("2**10 - 10**-3", "1023.999"),
        ("1e3 + 1_000", "2000"),
        ("(-1)**1000001", "-1"),
        ("0**9999999", "0"),
    ],
)
def test_the_calculator_is_exact(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("", "not an arithmetic expression"),
        ("1 +", "not an arithmetic expression"),
        ("(" * 150, "not an arithmetic expression"),
        ("1" * 201, "longer than 200 characters"),
        ("9**9**9", "too large"),
        ("(10**600)*(10**600)", "too large"),
        ("1e99999", "moderate size"),
        ("0x10", "not a decimal number"),
        ("2**0.5", "an exponent is a whole number"),
        ("__import__('os')", "only numbers"),
        ("().__class__", "only numbers"),
        ("[1 for _ in (1,)]", "only numbers"),
        ("'a' * 3", "only numbers"),
        ("True + 1", "only numbers"),
        ("1j", "only numbers"),
        ("1 if 2 else 3", "only numbers"),
    ],
)
def test_the_calculator_refuses_everything_else(expression, complaint):
    with pytest.raises(ValueError, match=complaint.replace("(", "\\(")):
        calculator(expression)


expressions = st.recursive(
    st.integers(0, 10**6).map(str) | st.decimals(0, 100, places=2).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({''.join(parts)})"),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(expression=expressions)
def test_the_calculator_agrees_with_fractions(expression):
    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(str(node.value))
        left, right = value(node.left), value(node.right)
        return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}.get(type(node.op)) or (
            left / right if isinstance(node.op, ast.Div) else Fraction(0)
        )

    try:
        expected = value(ast.parse(expression, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            calculator(expression)
        return
    assert Fraction(calculator(expression)) == expected


@settings(max_examples=300, deadline=None)
@given(expression=st.text("0123456789.+-*/%()e_ aj~<,'\0\n", max_size=30) | st.text(max_size=20))
def test_any_text_is_calculated_or_refused(expression):
    with contextlib.suppress(ValueError):
        assert Fraction(calculator(expression)) is not None


# Environments


def test_a_problem_with_one_answer_is_over_after_it():
    environment = SingleTurn(QUESTION)
    assert environment.reset() == QUESTION
    assert environment.step(parse_turn(seal_text("a<｜end▁of▁sentence｜>"))).messages == ()


def test_results_and_errors_come_back_in_the_order_of_the_calls():
    environment = ToolUse(QUESTION, [function_tool(calculator), function_tool(forecast)])
    assert [tool["function"]["name"] for tool in environment.reset()[0]["tools"]] == ["calculator", "forecast"]
    observation = environment.step(
        turn_that_calls(
            ToolCall("calculator", {"expression": "6*7"}),
            ToolCall("fly", {}),
            ToolCall("calculator", {"expression": "1/0"}),
            ToolCall("forecast", {"city": "Rome", "days": "x"}),
        )
    )
    assert [message["content"] for message in observation.messages] == [
        "42",
        "Error: there is no tool 'fly'; there are calculator, forecast",
        "Error: ValueError: division by zero",
        "Error: 'days' is of type integer, not \"x\"",
    ]
    assert (observation.tool_calls, observation.tool_errors) == (4, 3)


def test_calls_that_cannot_be_read_come_back_as_an_error_and_none_is_carried_out():
    carried_out = []

    def note(text: str) -> str:
        """Remember."""
        carried_out.append(text)
        return "done"

    environment = ToolUse(QUESTION, [function_tool(note)])
    text = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="note">\n<｜DSML｜parameter name="text" string="true">a'
        '</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="note">\nb</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
    )
    turn = parse_turn(seal_text(text))
    assert len(turn.tool_calls) == 1
    (message,) = environment.step(turn).messages
    assert message["role"] == "tool"
    where = text.index("b</")
    assert message["content"].startswith(f"Error: these tool calls cannot be read: at character {where}: expected a <")
    assert carried_out == []


def test_a_long_result_is_cut_and_says_so():
    environment = ToolUse(QUESTION, [function_tool(_repeat)], longest_result=10)
    (message,) = environment.step(turn_that_calls(ToolCall("_repeat", {"text": "ab", "times": 50}))).messages
    assert message["content"] == "ababababab... (cut off: 100 characters)"
    (message,) = environment.step(turn_that_calls(ToolCall("_repeat", {"text": "\ud800", "times": 1}))).messages
    assert message["content"] == "?"


def _repeat(text: str, times: int) -> str:
    return text * times


# Problems for the calculator


def test_calculations_are_in_one_place_each_and_the_same_for_every_seed():
    sizes = {"train": 300, "selection": 40, "holdout": 60}
    first, second = (generate_calculations("sums", sizes, seed) for seed in (0, 1))
    assert [len(first.train), len(first.selection), len(first.holdout)] == [300, 40, 60]
    assert (first.selection, first.holdout) == (second.selection, second.holdout)
    assert first.train != second.train
    ids = [problem.id for problem in (*first.train, *second.train, *first.selection, *first.holdout)]
    assert len(set(ids)) >= 695 and not {p.id for p in first.train} & {p.id for p in first.holdout + first.selection}
    with pytest.raises(BadInput, match="needs 2 <= min_digits <= max_digits <= 30, not 1 and 5"):
        generate_calculations("sums", sizes, 0, min_digits=1)
    with pytest.raises(BadInput, match=r"too few different calculations: [67]\d{3} of 8000 for train"):
        generate_calculations("sums", {**sizes, "train": 8000}, 0, min_digits=2, max_digits=2, shapes=["a*b"])


def test_demonstrations_are_what_the_calculator_returns():
    tool = function_tool(calculator)
    for problem in generate_calculations("sums", {"train": 50, "selection": 0, "holdout": 0}, 0).train:
        conversation = demonstrate(problem, "I cannot do this in my head.")
        check_conversation(with_tools(conversation, [tool.schema()]))
        arguments = ast.literal_eval(conversation[1]["tool_calls"][0]["function"]["arguments"])
        assert tool.run(ToolCall("calculator", arguments)) == conversation[2]["content"] == problem.answer


def test_half_of_the_demonstrations_answer_at_once():
    problems = generate_calculations("sums", {"train": 400, "selection": 0, "holdout": 0}, 0).train
    shown = [demonstrate_half(problem) for problem in problems]
    assert 160 < sum(conversation == demonstrate(one) for conversation, one in zip(shown, problems, strict=True)) < 240
    assert {len(conversation) for conversation in shown} == {2, 4}
    assert all(conversation[-1]["content"] == one.answer for conversation, one in zip(shown, problems, strict=True))
