"""Rewards for structured text, lengths and languages: values computed by hand, and what holds for any text."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from posttrain.data.problems import Problem, make_problem
from posttrain.errors import BadInput


def problem(answer: str, **entry) -> Problem:
    return make_problem("d", [{"role": "user", "content": "question"}], answer, entry, None)


def value(spec, text: str, answer: str = "1", tokens: int = 1, **entry) -> float:
    """What the reward says, as the second one of two."""
    (name,) = [spec] if isinstance(spec, str) else spec
    result = rewards.build(["exact", spec]).score(problem(answer, **entry), text, [0] * tokens, "stop")
    assert result.error is None, result.error
    return result.parts[name]


def error(spec, text: str, answer: str = "1", **entry) -> str:
    result = rewards.build(["exact", spec]).score(problem(answer, **entry), text, [0], "stop")
    assert result.total == 0 and result.error is not None
    return result.error


@pytest.mark.parametrize(
    ("pattern", "answer", "text", "right"),
    [
        (r"#### (.*)", "so it is\n#### 42", "thinking\n#### 42", 1),
        (r"#### (.*)", "42", "#### 41\nno,\n#### 42 ", 1),
        (r"#### (.*)", "42", "#### 42\n#### 41", 0),
        (r"#### (.*)", "42", "42", 1),
        (r"\\boxed\{([^}]*)\}", "42", r"it is \boxed{42}.", 1),
        (r"\\boxed\{([^}]*)\}", "42", r"it is 42.", 0),
        (r"(?:(x)|y)", "y", "y", 1),
    ],
)
def test_exact_compares_what_the_pattern_extracts_last(pattern: str, answer: str, text: str, right: int) -> None:
    result = rewards.build([{"exact": {"extract": pattern}}]).score(problem(answer), text, [1], "stop")
    assert result.error is None and result.total == right


def test_numeric_compares_what_the_pattern_extracts() -> None:
    scorer = rewards.build([{"numeric": {"extract": r"answer: (\S+)", "tolerance": 0.01}}])
    assert scorer.score(problem("100"), "answer: 100.5", [1], "stop").correct
    assert not scorer.score(problem("100"), "answer: 102", [1], "stop").correct
    assert not scorer.score(problem("100"), "it is 100", [1], "stop").correct


def test_an_extracting_pattern_that_explodes_marks_the_sample() -> None:
    result = rewards.build([{"exact": {"extract": "((?:a|aa)+)c"}}]).score(problem("1"), "a" * 50, [1], "stop")
    assert result.error is not None and "TimeoutError" in result.error


@pytest.mark.parametrize(
    ("answer", "text", "equal"),
    [
        ('{"a": 1, "b": [true, null]}', ' {"b": [true, null], "a": 1}\n', 1),
        ('{"a": 1}', '```json\n{"a": 1}\n```', 1),
        ('{"a": 1}', '```\n{"a": 1.0}```', 1),
        ("[1, 2]", "[2, 1]", 0),
        ("[1]", "[true]", 0),
        ("[0]", "[false]", 0),
        ('{"a": 1}', '{"a": 1, "b": 2}', 0),
        ("3", "3 of them", 0),
        ("3", "", 0),
        ("null", "NaN", 0),
        ("null", "[" * 100_000, 0),
        ("1", "1" * 10_000, 0),
        ('"x"', "'x'", 0),
    ],
)
def test_json_equal(answer: str, text: str, equal: int) -> None:
    result = rewards.build(["json_equal"]).score(problem(answer), text, [1], "stop")
    assert result.error is None and result.total == equal


def test_json_equal_needs_a_reference_that_is_json() -> None:
    result = rewards.build(["json_equal"]).score(problem("{a: 1}"), "{}", [1], "stop")
    assert result.error.startswith("json_equal: ValueError: the reference answer '{a: 1}' is no JSON")


@pytest.mark.parametrize(
    ("keys", "text", "right"),
    [
        ([], "[1]", 1),
        ([], "{", 0),
        (["a"], '{"a": 1, "b": 2}', 1),
        (["a", "c"], '{"a": 1, "b": 2}', 0),
        (["a"], '["a"]', 0),
        (["a"], '```json\n{"a": null}\n```', 1),
    ],
)
def test_json_format(keys: list[str], text: str, right: int) -> None:
    assert value({"json_format": {"keys": keys}}, text) == right


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(one=json_values, indent=st.sampled_from([None, 2]), fence=st.booleans())
def test_json_equals_itself_however_it_is_written(one, indent, fence) -> None:
    text = json.dumps(one, indent=indent, sort_keys=True)
    result = rewards.build(["json_equal"]).score(
        problem(json.dumps(one)), f"```json\n{text}\n```" if fence else text, [1], "stop"
    )
    assert result.error is None and result.correct


EFFORT = {"k0": 2.0, "tau": 33.0, "norm": 1000.0, "cap": 0.5}


@pytest.mark.parametrize(
    ("effort", "tokens", "penalty"),
    [
        (1, 0, 0.0),
        (1, 100, -0.2),  # 2 * 100 / 1000
        (1, 250, -0.5),  # exactly the cap
        (1, 10_000, -0.5),
        (34, 100, -0.2 / math.e),  # one tau above the lowest effort
        (100, 1000, -2 * math.exp(-3)),  # three of them
        (100, 10_000, -0.5),
    ],
)
def test_the_effort_penalty_by_hand(effort: float, tokens: int, penalty: float) -> None:
    assert value({"effort_length": {**EFFORT, "effort": effort}}, "x", tokens=tokens) == pytest.approx(
        penalty, abs=1e-12
    )
    assert value({"effort_length": EFFORT}, "x", tokens=tokens, effort=effort) == pytest.approx(penalty, abs=1e-12)


def test_the_lowest_effort_can_be_another() -> None:
    spec = {"effort_length": {**EFFORT, "effort": 10, "effort_min": 10}}
    assert value(spec, "x", tokens=100) == pytest.approx(-0.2)


@settings(max_examples=150, deadline=None)
@given(
    efforts=st.lists(st.floats(1, 100), min_size=2, max_size=2).map(sorted),
    tokens=st.lists(st.integers(0, 5000), min_size=2, max_size=2).map(sorted),
)
def test_more_tokens_cost_more_and_more_effort_costs_less_and_nothing_exceeds_the_cap(efforts, tokens) -> None:
    (low, high), (few, many) = efforts, tokens
    cost = {
        (effort, count): value({"effort_length": {**EFFORT, "effort": effort}}, "x", tokens=count)
        for effort in efforts
        for count in tokens
    }
    assert all(-EFFORT["cap"] <= one <= 0 for one in cost.values())
    assert cost[low, many] <= cost[low, few] and cost[low, many] <= cost[high, many]


@pytest.mark.parametrize("effort", [None, "high", True])
def test_a_problem_without_an_effort_marks_the_sample(effort) -> None:
    entry = {} if effort is None else {"effort": effort}
    assert "the problem's `effort` is a number" in error({"effort_length": EFFORT}, "x", **entry)


@settings(max_examples=100, deadline=None)
@given(target=st.integers(0, 50), extra=st.integers(1, 50), tokens=st.integers(0, 200))
def test_the_linear_penalty_is_between_0_and_1_and_falls(target, extra, tokens) -> None:
    spec = {"length": {"target": target, "limit": target + extra}}
    cost, next_cost = value(spec, "x", tokens=tokens), value(spec, "x", tokens=tokens + 1)
    assert -1 <= next_cost <= cost <= 0
    if target <= tokens < target + extra:
        assert cost - next_cost == pytest.approx(1 / extra)


@pytest.mark.parametrize(
    ("scripts", "text", "share"),
    [
        (["LATIN"], "The answer is 42.", 1),
        (["LATIN"], "Ответ: yes", 3 / 8),
        (["CJK"], "答案是 x", 3 / 4),
        (["CJK", "HIRAGANA", "KATAKANA"], "答えはイエス", 1),
        (["CYRILLIC"], "", 1),
        (["CYRILLIC"], "1 + 1 = 2", 1),
        (["CYRILLIC"], "да ```python\nprint(1)\n``` да", 1),
        (["CYRILLIC"], "да ```python\nprint(1)", 1),
        (["CYRILLIC"], "да `code` и $x + y$, \\(z\\), \\[w\\] и $$v$$", 1),
        (["LATIN"], "naïve é", 1),
    ],
)
def test_language_is_the_share_of_its_letters(scripts: list[str], text: str, share: float) -> None:
    assert value({"language": {"scripts": scripts}}, text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text", ["\\[ " * 20_000, "\\( " * 20_000, "$" * 40_001, "```" * 20_000, "`" * 40_001, "$$a" * 20_000]
)
def test_language_reads_degenerate_text_in_linear_time(text: str) -> None:
    assert 0 <= value({"language": {"scripts": ["LATIN"]}}, text) <= 1


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_no_text_makes_the_quick_rewards_raise(text: str) -> None:
    scorer = rewards.build(
        [
            {"exact": {"extract": "a(.)"}},
            {"numeric": {"extract": "=(.*)"}},
            {"language": {"scripts": ["LATIN"]}},
            {"json_format": {"keys": ["a"]}},
            {"effort_length": {**EFFORT, "effort": 50}},
        ]
    )
    result = scorer.score(problem("1"), text, [1], "stop")
    assert result.error is None and math.isfinite(result.total) and len(result.parts) == 5


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"exact": {"extract": "("}}, r"the pattern '\(' is no regular expression"),
        ({"exact": {"extract": "x"}}, "the `extract` of exact has one group, for the answer: 'x' has not"),
        ({"numeric": {"extract": "(a)(b)"}}, "the `extract` of numeric has one group"),
        ({"json_format": {"keys": "a"}}, "the keys of json_format is a list of texts, not 'a'"),
        ({"language": {"scripts": []}}, "the scripts of language are some of LATIN, "),
        ({"language": {"scripts": ["english"]}}, r"the scripts of language are some of LATIN, .*, not \['english'\]"),
        ({"language": {}}, "missing a required argument: 'scripts'"),
        ({"effort_length": {**EFFORT, "tau": 0}}, "the tau of effort_length is a number above 0, not 0"),
        ({"effort_length": {**EFFORT, "cap": math.inf}}, "the cap of effort_length"),
        ({"effort_length": {**EFFORT, "effort": "max"}}, "the effort of effort_length is a number, not 'max'"),
        ({"code": {"partial": 1}}, "the partial of code is true or false, not 1"),
        ({"code": {"seconds": 0}}, "the seconds of code are a number above 0"),
        ({"code": {"memory_mib": 16}}, "the memory_mib of code are a whole number of at least 64, not 16"),
        ({"rubric": {"judge": "no_such_module:f"}}, "no_such_module:f cannot be imported"),
        (
            {"rubric": {"judge": 3}},
            "the judge of rubric is `package.module:function`, or {actor: a judge domain, votes: how many} "
            "for the model itself, not 3",
        ),
    ],
)
def test_options_that_do_not_fit_are_bad_input(spec, complaint: str) -> None:
    with pytest.raises(BadInput, match=rf"^reward\[0\]: .*{complaint}"):
        rewards.build([spec])


@pytest.mark.parametrize("name", ["language", "json_format", "effort_length"])
def test_a_reward_that_shapes_cannot_decide_what_is_correct(name: str) -> None:
    options = {"language": {"scripts": ["LATIN"]}, "effort_length": EFFORT}
    with pytest.raises(BadInput, match=f"{name} cannot be first"):
        rewards.build([{name: options.get(name, {})}])
