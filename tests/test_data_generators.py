"""Problems that are drawn by functions: splits, puzzles, reasoning for sums, and functions that are no good."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from posttrain.data import load_domains
from posttrain.data.problems import Problem, make_problem, split_key
from posttrain.data.puzzles import string_function, true_clauses
from posttrain.data.steps import running_totals, written_totals
from posttrain.errors import BadInput
from posttrain.recipe import Recipe
from rewards import build
from tests.recipe_kit import recipe_with

HERE = "tests.test_data_generators"


def squares(random: Random, largest: int) -> dict[str, Any]:
    number = random.randint(1, largest)
    return {"prompt": f"{number} squared", "answer": number**2, "number": number}


def no_answer(random: Random) -> dict[str, Any]:
    return {"prompt": str(random.random())}


def recipe_of(generator: str, params: dict[str, Any], seed: int = 3) -> Recipe:
    source = {"generator": generator, "params": params}
    return Recipe.model_validate(recipe_with({"domains.sums.source": source, "seed": seed}))


def test_rows_of_a_function_become_problems_in_three_places_that_the_seed_does_not_move() -> None:
    params = {"largest": 10_000}
    first, second = (load_domains(recipe_of(f"{HERE}:squares", params, seed))["sums"] for seed in (3, 4))
    assert (len(first.train), len(first.selection), len(first.holdout)) == (100, 16, 32)
    assert first.holdout == second.holdout and first.selection == second.selection and first.train != second.train
    keys = [split_key(one.messages) for one in (*first.train, *first.selection, *first.holdout, *second.train)]
    assert len(set(keys[:148])) == 148 and set(keys[148:]).isdisjoint(keys[100:148])
    assert all(one.answer == str(one.entry["number"] ** 2) for one in first.train)


@pytest.mark.parametrize(
    ("generator", "params", "message"),
    [
        (f"{HERE}:squares", {"largest": 40}, r"domains\.sums: there are too few different problems of .*:squares"),
        (
            f"{HERE}:squares",
            {"smallest": 1},
            r"domains\.sums\.source\.generator: .*:squares fails: TypeError: .*smallest",
        ),
        (f"{HERE}:no_answer", {}, r"domains\.sums\.source\.generator: .*:no_answer fails: .*`answer` .* missing"),
    ],
)
def test_a_function_that_is_no_good_is_named(generator: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_domains(recipe_of(generator, params))


def test_true_clauses_are_counted() -> None:
    random, seen = Random(0), set()
    truth = {"&": "0001", "|": "0111", "^": "0110"}
    for _ in range(200):
        row = true_clauses(random, clauses=4)
        clauses = row["prompt"].removesuffix("#").split(" ")
        assert row["answer"] == sum(int(truth[sign][2 * int(a) + int(b)]) for a, sign, b in clauses)
        assert len(clauses) == 4
        seen.add(row["answer"])
    assert seen == {0, 1, 2, 3, 4}


def test_the_answers_of_string_functions_pass_their_tests_and_others_do_not() -> None:
    random, scorer = Random(1), build(["code"])
    rows = [string_function(random, 2, 3) for _ in range(3)]
    problems = [make_problem("code", [{"role": "user", "content": r["prompt"]}], r["answer"], r, None) for r in rows]
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        assert scorer.score(problem, problem.answer, [1], "stop").correct
        assert not scorer.score(problem, other.answer, [1], "stop").correct


def test_sums_of_several_numbers_are_written_step_by_step() -> None:
    entry = {"metadata": {"expression": "3 - 5 + 2 + 8"}}
    problem = Problem("sums/1", "sums", ({"role": "user", "content": "3 - 5 + 2 + 8="},), "8", entry)
    assert running_totals(problem) == "-2,0,8"
    assert written_totals(problem) == "3-5=-2,-2+2=0,0+8=8"
