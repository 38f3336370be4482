"""Rewards: what each says, how they add up, and that a failing one marks the sample and nothing more."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from posttrain.data import load_domain
from posttrain.data.problems import Problem, make_problem
from posttrain.errors import BadInput
from posttrain.recipe.domains import DomainConfig

# Functions of a user's, found by their import path.


def starts_like_reference(problem, text, token_ids, finish_reason, *, letters: int = 1):
    return float(text[:letters] == problem.answer[:letters])


def raises(problem, text, token_ids, finish_reason):
    raise RuntimeError("the judge is out")


def not_a_number(problem, text, token_ids, finish_reason):
    return math.nan


def nothing(problem, text, token_ids, finish_reason):
    return None


def several(problem, text, token_ids, finish_reason):
    return [1.0, 0.5]


def words(problem, text, token_ids, finish_reason):
    return "1"


def problem(answer: str, **entry) -> Problem:
    return make_problem("d", [{"role": "user", "content": "question"}], answer, entry, None)


def score(spec, answer: str, text: str, token_ids=(1,), finish_reason="stop"):
    return rewards.build([spec]).score(problem(answer), text, token_ids, finish_reason)


def only_part(result: rewards.RewardResult) -> float:
    assert result.error is None
    (value,) = result.parts.values()
    return value


def test_importing_the_rewards_loads_no_heavy_library():
    code = (
        "import sys, rewards; rewards.known_rewards(); rewards.build(['exact', 'verifier', 'math_verify']);"
        "print([m for m in ('torch', 'transformers', 'reasoning_gym', 'math_verify') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"


def test_every_known_reward_can_be_built():
    options = {
        "format": {"pattern": ".*"},
        "length": {"target": 1, "limit": 2},
        "effort_length": {"k0": 1, "tau": 20, "norm": 100, "cap": 1},
        "language": {"scripts": ["LATIN"]},
        "rubric": {"judge": f"{__name__}:nothing"},
    }
    for name in rewards.known_rewards():
        rewards.build(["exact", {name: options.get(name, {})}] if name != "exact" else ["exact"])


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [("42", " 42\n", 1), ("42", "42.", 0), ("42", "", 0), ("Ab", "ab", 0), ("42", "the answer is 42", 0)],
)
def test_exact(answer, text, value):
    assert only_part(score("exact", answer, text)) == value


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("1234", "1,234", 1),
        ("1234", "+1234.0", 1),
        ("0.5", "1/2", 1),
        ("0.5", ".5", 1),
        ("300", "3e2", 1),
        ("5", "$5.", 1),
        ("12", "1,2", 0),
        ("5", "five", 0),
        ("5", "5 apples", 0),
        ("5", "1/0", 0),
        ("5", "1e999999999999", 0),
        ("5", "9" * 10_000, 0),
        ("5", "nan", 0),
        ("5", "٥", 0),
        ("3.14159", "3.1416", 0),
    ],
)
def test_numeric(answer, text, value):
    assert only_part(score("numeric", answer, text)) == value


def test_numeric_with_tolerance():
    spec = {"numeric": {"tolerance": 1e-3}}
    assert only_part(score(spec, "3.14159", "3.1416")) == 1
    assert only_part(score(spec, "-100", "-100.09")) == 1
    assert only_part(score(spec, "-100", "-100.2")) == 0
    assert "not a number" in score(spec, "pi", "3").error


def test_format_judges_the_whole_text():
    spec = {"format": {"pattern": r"-?\d+"}}
    scorer = rewards.build(["exact", spec])
    assert [scorer.score(problem("1"), text, [1], "stop").parts["format"] for text in (" -7 ", "7 a", "")] == [1, 0, 0]


def test_a_pattern_that_explodes_marks_the_sample():
    scorer = rewards.build(["exact", {"format": {"pattern": "(a|aa)+c"}}])
    began = time.monotonic()
    result = scorer.score(problem("1"), "a" * 40 + "b", [1], "stop")
    assert time.monotonic() - began < 30
    assert result.total == 0 and result.error is not None and result.error.startswith("format: TimeoutError")


def test_length_is_free_up_to_the_target_and_falls_linearly_to_the_limit():
    scorer = rewards.build(["exact", {"length": {"weight": 0.5, "target": 4, "limit": 8}}])
    parts = [scorer.score(problem("1"), "1", [0] * n, "stop").parts["length"] for n in (0, 4, 5, 8, 100)]
    assert parts == [0, 0, -0.25, -1, -1]
    assert scorer.score(problem("1"), "1", [0] * 6, "stop").total == pytest.approx(1 - 0.5 * 0.5)


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [("1/2", "0.5", 1), ("$\\frac{1}{2}$", "$0.5$", 1), ("$x+1$", "$1+x$", 1), ("2", "3", 0), ("2", "", 0)],
)
def test_math_verify(answer, text, value):
    assert only_part(score("math_verify", answer, text)) == value


def test_math_verify_outside_the_main_thread_marks_the_sample():
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(score, "math_verify", "2", "2").result()
    assert "main thread" in result.error and not result.correct


def generated(task: str, params: dict, prompt: str = "{question}") -> list[Problem]:
    source = {"reasoning_gym": task, "params": params, "prompt": prompt}
    return load_domain("d", DomainConfig(source=source, train=20, selection=4, holdout=4), 0).train


@pytest.mark.parametrize(
    ("task", "params"),
    [
        ("chain_sum", {"min_terms": 2, "max_terms": 2}),
        ("spell_backward", {"min_word_len": 3, "max_word_len": 10}),
        ("decimal_arithmetic", {"min_num_decimal_places": 1, "max_num_decimal_places": 1}),
    ],
)
def test_the_verifier_scores_as_reasoning_gym_does_with_the_domains_parameters(task, params):
    own = reasoning_gym.create_dataset(task, size=1, seed=0, **params)
    scorer = rewards.build(["verifier"])
    for example in generated(task, params):
        for text in (example.answer, example.answer + "1", example.answer[:-1], "x"):
            result = scorer.score(example, text, [1], "stop")
            assert result.error is None
            assert result.total == own.score_answer(text, example.entry)
        assert scorer.score(example, example.answer, [1], "stop").correct


def test_partial_credit_is_never_correct():
    scorer = rewards.build(["verifier"])
    for example in generated("spell_backward", {"min_word_len": 3, "max_word_len": 10}):
        result = scorer.score(example, example.answer + "s", [1], "stop")
        assert result.total > 0 and not result.correct, (example.answer, result)


def test_the_verifier_needs_a_generated_problem():
    assert "does not come from reasoning_gym" in score("verifier", "1", "1").error


def test_parts_are_kept_and_the_total_is_their_weighted_sum():
    scorer = rewards.build(
        [{"exact": {"weight": 2}}, {"format": {"weight": 0.5, "pattern": "\\d"}}, {"length": {"target": 1, "limit": 3}}]
    )
    result = scorer.score(problem("7"), "8", [1, 2], "stop")
    assert result.parts == {"exact": 0, "format": 1, "length": -0.5}
    assert result.total == pytest.approx(0.5 - 0.5)
    assert not result.correct
    assert scorer.score(problem("7"), "7", [1], "stop").correct


def test_correctness_does_not_depend_on_the_weight_or_the_later_parts():
    scorer = rewards.build([{"exact": {"weight": 0.1}}, {"length": {"weight": 9, "target": 0, "limit": 1}}])
    result = scorer.score(problem("7"), "7", [1, 2], "length")
    assert result.correct and result.total < 0


def test_a_users_function_is_a_reward_with_parameters():
    name = f"{__name__}:starts_like_reference"
    assert score(name, "abc", "axx").correct
    assert not score({name: {"letters": 2}}, "abc", "axx").correct


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("raises", "raises: RuntimeError: the judge is out"),
        ("not_a_number", "not_a_number: returned nan"),
        ("nothing", "nothing: TypeError"),
        ("several", "several: returned a list of length 2, not one number"),
        ("words", "words: returned a str of length 1, not one number"),
    ],
)
def test_a_reward_that_fails_marks_the_sample_and_never_the_run(function, error):
    scorer = rewards.build(["exact", f"{__name__}:{function}"])
    result = scorer.score(problem("1"), "1", [1], "stop")
    assert result.total == 0 and not result.correct
    assert result.problem_id == problem("1").id
    assert error in result.error
    assert result.parts == {"exact": 1}


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30), answer=st.text(max_size=10))
def test_no_text_makes_the_quick_rewards_raise(text, answer):
    scorer = rewards.build(["exact", {"format": {"pattern": "a*"}}, {"length": {"target": 1, "limit": 2}}])
    result = scorer.score(problem(answer), text, [1] * len(text), "stop")
    assert result.error is None and math.isfinite(result.total)
    assert score("numeric", "12", text).error is None


def test_a_scorer_travels_between_processes():
    scorer = pickle.loads(pickle.dumps(rewards.build(["exact", {"length": {"target": 1, "limit": 2}}])))
    assert scorer.score(problem("1"), "1", [1], "stop").total == 1


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        ([], r"^reward: give at least one of exact, "),
        (["exakt"], r"^reward\[0\]: there is no reward 'exakt' \(did you mean exact\?\); there are exact, verifier"),
        (["exact", 3], r"^reward\[1\]: a reward is a name or \{name: \{options\}\}, not 3"),
        ([{"exact": {}, "format": {}}], r"a reward is a name or"),
        ([{"exact": 2}], r"the options of exact are `key: value` pairs, not 2"),
        ([{"exact": {"weight": -1}}], r"the weight of exact is a number of at least 0, not -1"),
        ([{"exact": {"weight": "big"}}], r"the weight of exact is a number"),
        ([{"exact": {"weight": math.inf}}], r"the weight of exact is a number"),
        ([{"exact": {"case": True}}], r"exact does not take these options: got an unexpected keyword argument 'case'"),
        (["exact", "format"], r"^reward\[1\]: format does not take these options: missing a required .*'pattern'"),
        (["exact", {"format": {"pattern": "("}}], r"the pattern '\(' is no regular expression"),
        (["exact", {"length": {"target": 9, "limit": 9}}], r"length needs whole numbers 0 <= target < limit"),
        ([{"numeric": {"tolerance": -1}}], r"the tolerance of numeric"),
        (["exact", "exact"], r"^reward: exact is there 2 times"),
        ([{"length": {"target": 1, "limit": 2}}], r"length cannot be first; the first reward decides what is correct"),
        (["no_such_module:f"], r"no_such_module:f cannot be imported: ModuleNotFoundError"),
        (["math:no_such_function"], r"math:no_such_function cannot be imported: AttributeError"),
        (["math:pi"], r"math:pi is not a function"),
        (["math:sqrt"], r"math:sqrt does not take these options: too many positional arguments"),
    ],
)
def test_a_wrong_reward_is_bad_input(specs, complaint):
    with pytest.raises(BadInput, match=complaint):
        rewards.build(specs)


def test_rewards_are_tried_on_a_reference_answer():
    rewards.check(rewards.build(["exact"]), problem("7"))
    with pytest.raises(
        BadInput, match=r"domains.d.reward fails on the reference answer '7' .* not come from reasoning"
    ):
        rewards.check(rewards.build(["verifier"]), problem("7"), "domains.d.reward")
    with pytest.raises(BadInput, match=r"fails on the reference answer 'seven'"):
        rewards.check(rewards.build(["numeric"]), problem("seven"))
    with pytest.raises(BadInput, match="calls an empty answer"):
        rewards.check(rewards.build([f"{__name__}:starts_like_reference"]), problem(""))
