"""Judging problems: made of another domain or of labels, in both orders, and never of what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from posttrain.data import load_domains
from posttrain.data.judging import near_miss, question_key
from posttrain.errors import BadInput
from posttrain.recipe import load_recipe
from tests.judge_kit import CRITERIA, JUDGED, RUBRIC, judged, judged_recipe, right, sum_of
from tests.recipe_kit import write_recipe


def said(problem: Any) -> str:
    return problem.messages[-1]["content"]


def test_every_answer_is_there_right_and_wrong_and_every_pair_in_both_orders() -> None:
    domains = load_domains(judged_recipe())
    verdicts, pairs = domains["verdicts"], domains["pairs"]
    assert [len(verdicts.train), len(verdicts.selection), len(verdicts.holdout)] == [100, 8, 16]
    for problem in verdicts.train + verdicts.holdout:
        assert (problem.answer == "yes") == right(said(problem)), said(problem)
    for first, second in zip(pairs.holdout[::2], pairs.holdout[1::2], strict=True):
        assert (first.answer, second.answer) == ("A", "B")
        assert first.entry["pair"] == second.entry["pair"] and first.id != second.id
        question, _, answers = said(first).partition("=")
        a, _, b = answers.rstrip("?").partition("|")
        assert said(second) == f"{question}={b}|{a}?" and int(a) == sum_of(said(first)) != int(b)


def test_a_question_is_judged_where_it_is_asked() -> None:
    domains = load_domains(judged_recipe())
    for split in ("train", "selection", "holdout"):
        asked = {said(problem) for problem in getattr(domains["sums"], split)}
        for judge in ("verdicts", "pairs"):
            assert {problem.entry["question"] for problem in getattr(domains[judge], split)} <= asked


def test_judging_problems_are_the_same_in_every_run_but_for_what_is_trained_on() -> None:
    one, other = load_domains(judged_recipe()), load_domains(judged_recipe({"seed": 4}))
    assert one["pairs"].holdout == other["pairs"].holdout
    assert one["pairs"].train != other["pairs"].train


@pytest.mark.parametrize("answer", ["7", "-12", "0", "Paris", "x + y", "?!", "ΑΒΓ"])
def test_a_near_miss_is_another_answer(answer: str) -> None:
    misses = {near_miss(answer, Random(seed)) for seed in range(50)}
    assert answer not in misses and len(misses) > 1


def labelled(tmp_path: Path, rows: list[Any], form: str = "single", **domain: Any) -> Any:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines) + "\n")
    judge = {"source": {"judging": {"labels": "labels.jsonl", "form": form}}, "max_new_tokens": 4, **domain}
    sums = {**JUDGED["domains"]["sums"], "reward": ["exact"]}
    recipe = load_recipe(
        write_recipe(
            tmp_path / "r.yaml", {"domains": {"sums": sums, "human": judge}, "evaluation": [{"holdout": {"n": 4}}]}
        )
    )
    return load_domains(recipe)


def test_labels_of_a_file_keep_each_question_in_one_place(tmp_path: Path) -> None:
    rows = [
        {"question": f"Is {n} nice?", "answer": text, "verdict": verdict, "criterion": "It is kind."}
        for n in range(20)
        for text, verdict in (("Very.", "yes"), ("No.", "no"))
    ]
    data = labelled(tmp_path, rows, holdout=8, selection=4)["human"]
    assert (len(data.holdout), len(data.selection), len(data.train)) == (8, 4, 28)
    places = [{question_key(problem) for problem in split} for split in (data.train, data.selection, data.holdout)]
    assert not places[0] & places[1] and not places[1] & places[2] and not places[0] & places[2]
    assert "Criterion: It is kind." in said(data.train[0])


def test_a_labelled_pair_is_there_in_both_orders(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "first": "good", "second": "bad", "verdict": "A"} for n in range(12)]
    data = labelled(tmp_path, rows, "pair", holdout=4, selection=4)["human"]
    assert len(data.holdout) == 4 and len(data.train) == 16
    for problem in data.train:
        assert said(problem).index("good") < said(problem).index("bad") or problem.answer == "B"
    assert sorted(problem.answer for problem in data.holdout) == ["A", "A", "B", "B"]


def test_what_another_domain_holds_out_is_not_learned_by_judging_it(tmp_path: Path) -> None:
    held_out = [said(problem) for problem in load_domains(judged_recipe())["sums"].holdout]
    asked = [*held_out, *(f"other {n}?" for n in range(20))]
    rows = [{"question": text, "answer": "5", "verdict": "no"} for text in asked]
    data = labelled(tmp_path, rows, holdout=4, selection=4)["human"]
    assert not {problem.entry["question"] for problem in data.train} & set(held_out)
    assert data.train


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "labels.jsonl:2: not JSON"),
        ([], "labels.jsonl:2: a row is an object, not list"),
        ({"question": "a?", "verdict": "no"}, "labels.jsonl:2: `answer` is text; it is missing"),
        ({"question": " ", "answer": "b", "verdict": "no"}, "labels.jsonl:2: `question` is text"),
        ({"question": "a?", "answer": "b", "verdict": "maybe"}, "`verdict` is yes or no, not 'maybe'"),
        ({"question": "1?", "answer": "b", "verdict": "no"}, "the same answer was labelled 'yes' before"),
    ],
)
def test_bad_labels_are_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(BadInput, match="has bad rows") as refused:
        labelled(tmp_path, [{"question": "1?", "answer": "b", "verdict": "yes"}, row])
    assert message in str(refused.value)


def test_too_few_labels_are_refused(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": "b", "verdict": "yes"} for n in range(4)]
    with pytest.raises(BadInput, match=r"domains\.human: its labels make 4 problems; holdout 4 .* leave none"):
        labelled(tmp_path, rows, holdout=4, selection=1)
    with pytest.raises(BadInput, match=r"domains\.pairs\.holdout asks for 40 problems; .* domains\.sums make 16"):
        load_domains(judged_recipe({"domains.pairs.holdout": 40}))


SOURCE = "domains.verdicts.source.judging"
REWARD = "domains.sums.reward[1].rubric"


def rubric(**changes: Any) -> dict[str, Any]:
    return {"domains.sums.reward": [{"exact": {"weight": 0}}, {"rubric": {**RUBRIC["rubric"], **changes}}]}


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({f"{SOURCE}.domain": "words"}, f"{SOURCE}.domain", "no such domain; the domains are sums, verdicts, pairs"),
        ({f"{SOURCE}.domain": "pairs"}, f"{SOURCE}.domain", "pairs is a judge domain itself"),
        ({f"{SOURCE}.labels": "x.jsonl"}, SOURCE, "give exactly one of `domain`"),
        ({f"{SOURCE}.prompt": "{question}?"}, f"{SOURCE}.prompt", "leaves out {answer}"),
        ({f"{SOURCE}.prompt": "{question}{answer}{first}"}, f"{SOURCE}.prompt", "there is no {first}"),
        ({"domains.verdicts.reward": [RUBRIC]}, "domains.verdicts.reward[0].rubric", "say by `exact`"),
        (rubric(judge={"actor": "nobody"}), f"{REWARD}.judge.actor", "no such domain; the judge domains are verdicts"),
        (rubric(judge={"actor": "pairs"}), f"{REWARD}.judge.actor", "pairs does not judge single answers"),
        (rubric(judge={"actor": "sums"}), f"{REWARD}.judge.actor", "sums does not judge single answers"),
        (rubric(judge={"actor": "verdicts", "vote": 2}), "domains.sums.reward[1]", "the judge of rubric is"),
        (rubric(judge={"actor": "verdicts", "votes": 0}), "domains.sums.reward[1]", "at least 1, not 0"),
        (rubric(judge="verdicts"), "domains.sums.reward[1]", "module"),
        (rubric(criteria=None), f"{REWARD}.criteria", "shows no {criterion}"),
        (rubric(criteria=[]), f"{REWARD}.criteria", "shows no {criterion}"),
        (rubric(criteria=[*CRITERIA, *CRITERIA]), f"{REWARD}.criteria", "give exactly one"),
        (rubric(criteria=[{"criterion": "x"}]), "domains.sums.reward[1]", "points: number above 0"),
        ({"evaluation": [{"judge": {"n": 17}}]}, "evaluation[0].judge.n", "domains.verdicts.holdout is 16"),
        ({"stages.experts.joint": {"words": ["pairs"]}}, "stages.experts.joint.words", "no such domain"),
        ({"stages.experts.joint": {"sums": ["words"]}}, "stages.experts.joint.sums[0]", "no such domain"),
        (
            {"stages.experts.joint": {"sums": ["pairs"], "verdicts": ["pairs"]}},
            "stages.experts.joint.verdicts[0]",
            "the expert of sums learns pairs already",
        ),
        (
            {"stages.experts.joint": {"sums": ["verdicts"], "verdicts": ["pairs"]}},
            "stages.experts.joint.sums[0]",
            "verdicts has an expert of its own",
        ),
        (
            {"stages.experts.joint": {"sums": ["pairs"]}, "stages.experts.overrides": {"pairs": [{"kind": "sft"}]}},
            "stages.experts.overrides.pairs",
            "pairs has no expert of its own: that of sums learns it",
        ),
        (
            {"stages.experts.joint": {"sums": ["pairs"]}, "stages.student.teachers": {"sums": [{"expert": "pairs"}]}},
            "stages.student.teachers.sums[0].expert",
            "pairs has no expert of its own",
        ),
    ],
)
def test_bad_judges_are_refused_by_their_key(tmp_path: Path, changes: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(BadInput) as refused:
        load_recipe(write_recipe(tmp_path / "r.yaml", judged(changes)))
    assert f": {key}: " in str(refused.value) and message in str(refused.value), refused.value


def test_an_evaluation_of_judges_needs_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"evaluation\[0\]\.judge: there is no judge domain"):
        load_recipe(write_recipe(tmp_path / "r.yaml", {"evaluation": [{"judge": {"n": 4}}]}))
