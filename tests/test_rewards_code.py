"""The reward for programs: what of an answer is run, what a problem must have, what a verdict is worth."""

from __future__ import annotations

import pickle

import pytest

import rewards
from posttrain.data.problems import Problem, make_problem
from posttrain.errors import BadInput
from rewards import sandbox
from rewards.code import program_of

SOLUTION = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4\nassert double(-1) == -2\nassert double(0) == 0\nassert double('a') == 'aa'\n"
CASES = [{"stdin": "2\n", "stdout": "4\n"}, {"stdin": "5\n", "stdout": "10"}]


def problem(answer: str = SOLUTION, **entry) -> Problem:
    return make_problem("code", [{"role": "user", "content": "question"}], answer, entry, None)


def score(text: str, of: Problem, **options) -> rewards.RewardResult:
    return rewards.build([{"code": options}]).score(of, text, [1], "stop")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("print(1)", "print(1)"),
        ("Here it is:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```\nfirst\n```\nbetter:\n```py\nsecond\n```", "second\n"),
        ("```python\ncut off", "cut off"),
        ("  ```python\n  indented\n  ```", "  indented\n"),
        ("use `x` and ```y``` here", "use `x` and ```y``` here"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_fenced_block_or_all(text: str, program: str) -> None:
    assert program_of(text) == program


def test_a_program_that_passes_all_tests_is_correct() -> None:
    result = score(f"Sure:\n```python\n{SOLUTION}```", problem(tests=TESTS))
    assert (result.total, result.correct, result.parts) == (1, True, {"code": 1.0})


def test_one_that_passes_some_is_worth_nothing_or_with_partial_its_share() -> None:
    half = "def double(x):\n    return x + x if x else None\n"
    assert score(half, problem(tests=TESTS)).total == 0
    result = score(half, problem(tests=TESTS), partial=True)
    assert result.total == 0.75 and not result.correct


@pytest.mark.parametrize(
    "text", ["", "no code at all", "```python\ndef double(x)\n```", "import os\nos._exit(0)", "\ud800", "\0"]
)
def test_an_answer_that_is_no_program_is_wrong_and_no_failure(text: str) -> None:
    result = score(text, problem(tests=TESTS))
    assert result.error is None and result.total == 0


def test_the_same_program_for_the_same_problem_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, str]] = []

    def examine(program: str, tests: str, *_: object) -> sandbox.Verdict:
        runs.append((program, tests))
        if program == "crash":
            raise sandbox.SandboxError("no jail")
        return sandbox.Verdict(int(program == "right"), 1, ())

    monkeypatch.setattr(sandbox, "examine", examine)
    problems = [
        make_problem("code", [{"role": "user", "content": one}], "", {"tests": one}, None) for one in ("1", "2")
    ]
    asked = [(0, "right"), (0, "wrong"), (1, "right"), (0, "right"), (1, "crash"), (0, "wrong"), (1, "crash")]
    answers = [rewards.Answer(problems[index], text, [1], "stop") for index, text in asked]
    found = rewards.build([{"code": {"isolated": False}}]).score_batch(answers)
    assert sorted(runs) == [("crash", "2"), ("right", "1"), ("right", "2"), ("wrong", "1")]
    assert [result.total for result in found] == [1, 0, 1, 1, 0, 0, 0]
    assert [result.error is not None for result in found] == [False] * 4 + [True, False, True]


def test_cases_compare_what_is_printed() -> None:
    assert score("print(2 * int(input()))", problem(cases=CASES)).correct
    assert score("print(4)", problem(cases=CASES)).total == 0
    assert score("print(4)", problem(cases=CASES), partial=True).total == 0.5


def test_a_prefix_goes_in_front_and_check_gets_the_entry_point() -> None:
    of = problem(
        answer="    return 2 * x",
        prefix="def double(x):\n",
        tests="def check(candidate):\n    assert candidate(3) == 6",
        entry_point="double",
    )
    assert score("    return 2 * x", of).correct
    assert not score("    return x", of).correct
    rewards.check(rewards.build(["code"]), of)


def test_a_program_over_its_time_is_wrong() -> None:
    result = score("while True: pass", problem(tests=TESTS), seconds=1)
    assert result.error is None and result.total == 0


def test_a_batch_is_judged_side_by_side_and_in_order() -> None:
    texts = [SOLUTION, "x", SOLUTION, "def double(x): return 0", SOLUTION]
    results = rewards.build(["code"]).score_batch(
        [rewards.Answer(problem(tests=TESTS), text, [1], "stop") for text in texts]
    )
    assert [result.total for result in results] == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({}, "has either `tests` (text) or `cases` (a list of {stdin, stdout})"),
        ({"tests": TESTS, "cases": CASES}, "has either `tests` (text) or `cases`"),
        ({"tests": 3}, "`tests` is text, not int"),
        ({"tests": "assert ("}, "`tests` is no Python: "),
        ({"tests": TESTS, "entry_point": 1}, "`entry_point` is text, not int"),
        ({"cases": []}, "`cases` is a list of at least one {stdin: text, stdout: text}"),
        ({"cases": [{"stdin": "1"}]}, "`cases` is a list of at least one"),
        ({"cases": [{"stdin": "1", "stdout": 1}]}, "`cases` is a list of at least one"),
        ({"cases": "x"}, "`cases` is a list of at least one"),
    ],
)
def test_a_problem_that_cannot_be_judged_is_known_before_and_marks_its_sample(entry: dict, complaint: str) -> None:
    of = problem(**entry)
    assert complaint in rewards.build(["code"]).unfit([of])[of.id]
    result = score(SOLUTION, of)
    assert (
        result.problem_id == of.id and str(result.error).startswith("code: ValueError: ") and complaint in result.error
    )


def test_tests_that_test_nothing_mark_the_sample() -> None:
    assert "there are no tests" in str(score(SOLUTION, problem(tests="x = 1")).error)


def test_the_reference_solution_must_pass_and_an_empty_one_must_not() -> None:
    scorer = rewards.build(["code"])
    rewards.check(scorer, problem(tests=TESTS))
    with pytest.raises(BadInput, match=r"code gives the reference answer .* 0\.0, not 1"):
        rewards.check(scorer, problem("def double(x): return 0", tests=TESTS))
    with pytest.raises(BadInput, match="calls an empty answer"):
        rewards.check(scorer, problem(tests="assert True"))


def test_the_scorer_travels_between_processes() -> None:
    scorer = pickle.loads(pickle.dumps(rewards.build([{"code": {"partial": True}}])))
    assert scorer.score(problem(tests=TESTS), SOLUTION, [1], "stop").total == 1


def test_a_recipe_is_refused_where_programs_cannot_be_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "uncovered", lambda: ["files", "the network"])
    with pytest.raises(
        BadInput, match=r"^reward\[0\]: nothing here keeps programs from files, the network \(.*isolated: false"
    ):
        rewards.build(["code"])
    rewards.build([{"code": {"isolated": False}}])


def test_a_sandbox_that_fails_marks_the_sample_and_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_, **__):
        raise sandbox.SandboxError("no memory for a jail")

    scorer = rewards.build(["code"])
    monkeypatch.setattr(sandbox, "examine", broken)
    result = scorer.score(problem(tests=TESTS), SOLUTION, [1], "stop")
    assert result.error == "code: SandboxError: no memory for a jail" and not result.correct
