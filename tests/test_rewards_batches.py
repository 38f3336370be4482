"""Rewards that take many answers at once: order, failures of one and of all, rubrics, problems that do not fit."""

from __future__ import annotations

import math

import pytest

import rewards
from posttrain.data.problems import Problem, make_problem
from posttrain.errors import BadInput

CALLS: list[list[str]] = []


@rewards.batched
def lengths(problems, texts, token_ids, finish_reasons, *, scale: float = 1.0):
    CALLS.append(list(texts))
    return [scale * len(text) for text in texts]


@rewards.batched
def mixed(problems, texts, token_ids, finish_reasons):
    kinds = {"error": ValueError("no"), "nan": math.nan, "none": None, "list": [1], "infinite": math.inf}
    return [kinds.get(text, 1.0) for text in texts]


@rewards.batched
def too_few(problems, texts, token_ids, finish_reasons):
    return [1.0] * (len(texts) - 1)


@rewards.batched
def one_number(problems, texts, token_ids, finish_reasons):
    return 1.0


@rewards.batched
def raises(problems, texts, token_ids, finish_reasons):
    raise RuntimeError("the judge is out")


@rewards.needs(lambda problem, **_: None if "level" in problem.entry else "there is no `level`")
def by_level(problem, text, token_ids, finish_reason):
    return problem.entry["level"]


def generous(requests):
    return [[1.0 for _ in request.criteria] for request in requests]


def by_length(requests):
    """The first criterion is met by any text, the second by the letter a, the third half."""
    return [[float(bool(one.text)), float("a" in one.text), 0.5][: len(one.criteria)] for one in requests]


def careless(requests):
    return [[1.0] for _ in requests]


def excited(requests):
    return [[11.0 for _ in request.criteria] for request in requests]


def forgetful(requests):
    return []


def problem(answer: str = "1", question: str = "question", **entry) -> Problem:
    return make_problem("d", [{"role": "user", "content": question}], answer, entry, None)


def answers(*texts: str, **entry) -> list[rewards.Answer]:
    return [
        rewards.Answer(problem(question=f"q{index}", **entry), text, [0] * 3, "stop")
        for index, text in enumerate(texts)
    ]


def named(function: str) -> str:
    return f"{__name__}:{function}"


def test_a_batch_is_scored_in_order_as_single_answers_are() -> None:
    scorer = rewards.build(["exact", {named("lengths"): {"weight": 0.1}}, {"length": {"target": 0, "limit": 6}}])
    batch = answers("1", "", "11", "abc")
    results = scorer.score_batch(batch)
    assert results == [scorer.score(one.problem, one.text, one.token_ids, one.finish_reason) for one in batch]
    assert [result.problem_id for result in results] == [one.problem.id for one in batch]
    assert [result.parts[named("lengths")] for result in results] == [1, 0, 2, 3]
    assert [result.total for result in results] == pytest.approx([1 + 0.1 - 0.5, -0.5, 0.2 - 0.5, 0.3 - 0.5])
    assert [result.correct for result in results] == [True, False, False, False]


def test_a_batched_reward_is_asked_once_and_only_of_answers_that_no_earlier_reward_failed_on() -> None:
    CALLS.clear()
    rewards.build([named("mixed"), {named("lengths"): {"scale": 2}}]).score_batch(answers("a", "nan", "b"))
    assert CALLS == [["a", "b"]]
    CALLS.clear()
    assert rewards.build([named("raises"), named("lengths")]).score_batch(answers("a", "b"))[1].error
    assert rewards.build([named("lengths")]).score_batch([]) == []
    assert CALLS in ([], [[]])


def test_a_failure_in_the_place_of_a_reward_marks_that_answer_only() -> None:
    results = rewards.build([named("mixed")]).score_batch(answers("fine", "error", "nan", "none", "list", "infinite"))
    assert results[0].total == 1 and results[0].error is None
    errors = [str(result.error).removeprefix(f"{named('mixed')}: ") for result in results[1:]]
    assert errors[0] == "ValueError: no" and errors[1] == "returned nan" and errors[4] == "returned inf"
    assert errors[2].startswith("TypeError: ") and errors[3] == "returned a list of length 1, not one number"


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("too_few", "returned 2 rewards for 3 answers"),
        ("one_number", "TypeError: "),
        ("raises", "RuntimeError: the judge is out"),
    ],
)
def test_a_batch_that_fails_marks_its_samples_and_never_the_run(function: str, error: str) -> None:
    results = rewards.build(["exact", named(function)]).score_batch(answers("1", "2", "3"))
    for result in results:
        assert result.total == 0 and not result.correct and "exact" in result.parts
        assert str(result.error).startswith(f"{named(function)}: {error}")


def test_problems_that_cannot_be_judged_are_known_before() -> None:
    scorer = rewards.build(["numeric", named("by_level")])
    good, wordy, flat = problem("1", "a", level=1), problem("one", "b", level=1), problem("1", "c")
    assert scorer.unfit([good, wordy, flat]) == {
        wordy.id: "numeric: the reference answer 'one' is not a number",
        flat.id: f"{named('by_level')}: there is no `level`",
    }
    assert rewards.build(["verifier"]).unfit([good])[good.id].startswith("verifier: the problem does not come from")
    assert rewards.build([{"numeric": {"extract": "= (.*)"}}]).unfit([problem("x = 3")]) == {}


RUBRIC = [
    {"criterion": "is not empty", "points": 1},
    {"criterion": "has the letter a", "points": 2},
    {"criterion": "is half", "points": 1},
]


@pytest.mark.parametrize(("text", "share"), [("abc", (1 + 2 + 0.5) / 4), ("xyz", 1.5 / 4), ("", 0.5 / 4)])
def test_a_rubric_gives_the_share_of_its_points(text: str, share: float) -> None:
    scorer = rewards.build([{"rubric": {"judge": named("by_length")}}])
    assert scorer.score(problem(rubric=RUBRIC), text, [1], "stop").total == pytest.approx(share)


def test_a_judge_is_asked_once_for_all_answers_with_their_criteria() -> None:
    asked = []

    def judge(requests):
        asked.append([(request.problem.id, request.text, request.criteria) for request in requests])
        return generous(requests)

    batch = answers("a", "b", rubric=RUBRIC[:2])
    results = rewards.build([{"rubric": {"judge": judge}}]).score_batch(batch)
    assert [result.correct for result in results] == [True, True]
    criteria = ("is not empty", "has the letter a")
    assert asked == [[(one.problem.id, one.text, criteria) for one in batch]]


@pytest.mark.parametrize(
    ("judge", "error"),
    [
        ("careless", "ValueError: the judge gave 1 grades for 3 criteria"),
        ("excited", "ValueError: the judge gave grades outside 0 to 1: [11.0, 11.0, 11.0]"),
        ("forgetful", "ValueError: the judge graded 0 of 1 answers"),
    ],
)
def test_a_judge_that_misbehaves_marks_the_sample(judge: str, error: str) -> None:
    result = rewards.build([{"rubric": {"judge": named(judge)}}]).score(problem(rubric=RUBRIC), "a", [1], "stop")
    assert result.error == f"rubric: {error}"


@pytest.mark.parametrize(
    "rubric",
    [None, [], {}, ["good"], [{"criterion": "x"}], [{"criterion": "x", "points": 0}], [{"criterion": 1, "points": 1}],
     [{"criterion": "x", "points": True}], [{"criterion": "x", "points": math.inf}]],
)  # fmt: skip
def test_a_problem_without_a_proper_rubric_marks_its_samples_only(rubric) -> None:
    scorer = rewards.build([{"rubric": {"judge": named("generous")}}])
    bad, good = problem(question="bad", rubric=rubric), problem(question="good", rubric=RUBRIC)
    results = scorer.score_batch([rewards.Answer(one, "a", [1], "stop") for one in (bad, good)])
    assert results[0].error.startswith("rubric: ValueError: a problem for the reward `rubric` has a `rubric`")
    assert results[1].total == 1
    assert list(scorer.unfit([bad, good])) == [bad.id]


def test_a_rubric_needs_a_judge() -> None:
    with pytest.raises(BadInput, match="missing a required argument: 'judge'"):
        rewards.build(["rubric"])
