"""Generated problems: no overlap, independence of the seed where it matters, the same in every process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import DomainData, load_domain, load_domains
from posttrain.data.problems import make_problem, place, split_finite, split_key, split_of
from posttrain.data.template import fill_template
from posttrain.errors import BadInput
from posttrain.recipe.domains import DomainConfig
from posttrain.recipe.schema import Recipe

ROOT = Path(__file__).parent.parent
SUM = {"reasoning_gym": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "max_digits": 2}}
SUM["prompt"] = "{metadata[expression]}="
WORD = {
    "reasoning_gym": "spell_backward",
    "params": {"min_word_len": 3, "max_word_len": 6},
    "prompt": "{metadata[word]}",
}


def domain(source, **sizes) -> DomainConfig:
    return DomainConfig(source=source, **{"train": 2000, "selection": 64, "holdout": 128, **sizes})


def recipe(seed: int, **domains) -> Recipe:
    return Recipe(
        name="r",
        seed=seed,
        model={"config": "tiny"},
        domains=domains,
        stages={"experts": {"per_domain": [{"kind": "sft"}]}},
        evaluation=[{"holdout": {"n": 1}}],
    )


def keys(problems) -> set[str]:
    return {split_key(problem.messages) for problem in problems}


def ids(data: DomainData) -> dict[str, list[str]]:
    return {split: [p.id for p in getattr(data, split)] for split in ("train", "selection", "holdout")}


@pytest.mark.parametrize("source", [SUM, WORD], ids=["sums", "words"])
def test_training_selection_and_holdout_never_overlap_across_seeds(source):
    loaded = [load_domain("d", domain(source, train=4000), seed) for seed in range(3)]
    train = set().union(*(keys(data.train) for data in loaded))
    selection = set().union(*(keys(data.selection) for data in loaded))
    holdout = set().union(*(keys(data.holdout) for data in loaded))
    assert train.isdisjoint(selection) and train.isdisjoint(holdout) and selection.isdisjoint(holdout)
    for data in loaded:
        assert (len(data.train), len(data.selection), len(data.holdout)) == (4000, 64, 128)
        for problems in (data.train, data.selection, data.holdout):
            assert len({problem.id for problem in problems}) == len(problems)


def test_the_seed_draws_the_training_problems_and_nothing_else():
    first, second = (load_domain("d", domain(SUM), seed) for seed in (1, 2))
    assert ids(first)["holdout"] == ids(second)["holdout"]
    assert ids(first)["selection"] == ids(second)["selection"]
    assert ids(first)["train"] != ids(second)["train"]
    shared = set(ids(first)["train"]) & set(ids(second)["train"])
    assert len(shared) < 1000, "streams of neighbouring seeds are shifted copies of each other"
    assert ids(first) == ids(load_domain("d", domain(SUM), 1))


def test_other_sizes_move_no_problem_to_another_place():
    small, large = load_domain("d", domain(SUM), 0), load_domain("d", domain(SUM, train=9000, holdout=512), 0)
    assert ids(large)["holdout"][:128] == ids(small)["holdout"]
    assert ids(large)["selection"] == ids(small)["selection"]
    assert ids(large)["train"][:2000] == ids(small)["train"]
    assert keys(small.train).isdisjoint(keys(large.holdout))


def test_problems_are_the_same_in_every_process():
    code = """
import json, sys
from posttrain.data import load_domain
from posttrain.recipe.domains import DomainConfig
data = load_domain("d", DomainConfig(**json.loads(sys.argv[1])), 3)
print(json.dumps({s: [p.id for p in getattr(data, s)] for s in ("train", "selection", "holdout")}))
"""
    config = domain(WORD, train=300)
    result = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()],
        capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "1", "PYTHONPATH": "."},
    )  # fmt: skip
    assert json.loads(result.stdout) == ids(load_domain("d", config, 3))


def test_no_domain_trains_on_what_another_domain_holds_out():
    longer = {**SUM, "params": {"min_terms": 2, "max_terms": 3, "max_digits": 1}}
    loaded = load_domains(recipe(0, short=domain(SUM), long=domain(longer, train=1000)))
    for split in ("selection", "holdout"):
        reserved = set().union(*(keys(getattr(data, split)) for data in loaded.values()))
        assert all(keys(data.train).isdisjoint(reserved) for data in loaded.values())
    assert keys(loaded["short"].train) & keys(loaded["long"].train), "the two domains do have problems in common"


def test_a_file_domain_gives_up_training_problems_that_another_domain_holds_out(tmp_path):
    held_out = load_domain("sums", domain(SUM), 0).holdout
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": p.messages[-1]["content"], "answer": p.answer} for p in held_out]
    rows += [{"prompt": f"question {i}", "answer": i} for i in range(300)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    loaded = load_domains(recipe(0, sums=domain(SUM), rows=domain({"jsonl": str(path)}, selection=9, holdout=9)))
    assert keys(loaded["rows"].train).isdisjoint(keys(held_out))
    assert len(loaded["rows"].train) > 200
    assert len(loaded["sums"].holdout) == 128


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_case_spacing_and_unicode_form_do_not_move_a_problem(text):
    variant = [{"role": "user", "content": f"  {text.upper().casefold()} \n"}]
    same = [{"role": "system", "content": "Answer."}, {"role": "user", "content": text.casefold()}]
    if text.upper().casefold() == text.casefold():
        assert split_key(variant) == split_key(same)
    assert split_of(split_key(same)) in ("train", "selection", "holdout")
    assert 0 <= place(split_key(same)) < 1


def test_places_are_uniform():
    splits = [split_of(f"{i} + {i}=") for i in range(16_000)]
    assert abs(splits.count("holdout") - 2000) < 150
    assert abs(splits.count("selection") - 1000) < 110


def test_a_problem_knows_its_domain_prompt_and_entry():
    problem = load_domain("sums", domain(SUM).model_copy(update={"system": "Add."}), 0).train[0]
    expression = problem.entry["metadata"]["expression"]
    assert problem.messages == (
        {"role": "system", "content": "Add."},
        {"role": "user", "content": f"{expression}="},
    )
    assert problem.answer == str(sum(map(int, expression.replace("- ", "-").replace("+ ", "").split())))
    assert problem.id.startswith("sums/") and problem.domain == "sums"


def test_twenty_thousand_problems_take_seconds():
    began = time.process_time()
    load_domain("d", DomainConfig(source={**SUM, "params": {"min_terms": 2, "max_terms": 4}}), 0)
    assert time.process_time() - began < 8  # 1 s on an idle machine


def finite(count: int, held_out=None, seed=0, **sizes) -> DomainData:
    def problems(texts):
        return [make_problem("d", [{"role": "user", "content": text}], "1", {}, None) for text in texts]

    config = domain({"jsonl": "unused"}, **{"selection": 5, "holdout": 10, **sizes})
    rows = problems(f"question {i}" for i in range(count))
    return split_finite("d", rows, problems(held_out) if held_out else None, config, seed)


def test_a_file_is_split_exactly_and_completely_whatever_the_seed():
    first, second = finite(100, seed=1), finite(100, seed=2)
    assert (len(first.holdout), len(first.selection), len(first.train)) == (10, 5, 85)
    assert ids(first)["holdout"] == ids(second)["holdout"] and ids(first)["selection"] == ids(second)["selection"]
    assert ids(first)["train"] != ids(second)["train"]
    assert sorted(ids(first)["train"]) == sorted(ids(second)["train"])
    assert len(keys(first.train) | keys(first.selection) | keys(first.holdout)) == 100
    assert len(finite(100, train=7).train) == 7


def test_variants_of_one_text_are_never_split_apart():
    texts = [variant for i in range(40) for variant in (f"Question {i}", f"question  {i}", f"QUESTION {i}")]
    problems = [make_problem("d", [{"role": "user", "content": text}], "1", {}, None) for text in texts]
    for holdout in range(1, 12):
        data = split_finite("d", problems, None, domain({"jsonl": "unused"}, selection=4, holdout=holdout), 0)
        assert len(data.holdout) == holdout
        assert keys(data.holdout).isdisjoint(keys(data.selection) | keys(data.train))
        assert keys(data.selection).isdisjoint(keys(data.train))


def test_a_holdout_file_is_kept_out_of_training_and_selection():
    data = finite(50, held_out=[f"Question {i}" for i in range(10)])
    assert keys(data.holdout) == {f"question {i}" for i in range(10)}
    assert len(data.selection) + len(data.train) == 40


@pytest.mark.parametrize(
    ("count", "held_out", "complaint"),
    [
        (15, None, "domains.d has 15 distinct problems: holdout 10 and selection 5 leave none to train on"),
        (50, ["a", "b"], "domains.d.holdout asks for 10 problems; source.holdout_jsonl has 2 distinct ones"),
    ],
)
def test_a_file_that_is_too_small_is_bad_input(count, held_out, complaint):
    with pytest.raises(BadInput, match=complaint):
        finite(count, held_out)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (
            {"reasoning_gym": "chain_sums"},
            r"domains.d.source: reasoning_gym has no task 'chain_sums'; did you mean cha",
        ),
        ({**SUM, "params": {"terms": 2}}, r"domains.d.source: params: chain_sum takes no terms; it takes min_terms, "),
        ({**SUM, "params": {"seed": 2}}, r"takes no seed"),
        ({**SUM, "params": {"min_terms": 0}}, r"params: chain_sum refuses \{'min_terms': 0\}"),
        (
            {"reasoning_gym": "complex_arithmetic", "params": {"operations": ["+"]}},
            r"params: complex_arithmetic fails on \{'operations': \['\+'\]\}: ValueError",
        ),
        ({**SUM, "prompt": "{metadata[words]}"}, r"\{metadata\[words\]\}: there is no 'words'; there is .*expression"),
        ({**SUM, "prompt": "{metadata[num_terms]} terms"}, r"leaves out what the answer depends on: '2 terms'"),
        ({"reasoning_gym": "rush_hour"}, r"rush_hour gives no reference answers"),
    ],
)
def test_a_wrong_task_parameter_or_template_is_bad_input(source, complaint):
    with pytest.raises(BadInput, match=complaint):
        load_domain("d", domain(source), 0)


def test_too_few_distinct_problems_say_how_many_there_are():
    small = {**SUM, "params": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}  # 200 sums
    with pytest.raises(BadInput, match=r"domains.d.train asks for 2000 problems; .* has only 1\d\d distinct ones"):
        load_domain("d", domain(small, selection=4, holdout=8), 0)
    with pytest.raises(BadInput, match=r"domains.d.holdout asks for 128 problems; .* has only \d\d distinct ones"):
        load_domain("d", domain(small, train=50, selection=4), 0)


ENTRY = {"question": "Q?", "answer": "secret", "metadata": {"words": ["a", "b"], "n": 7, "nested": {"key": "x"}}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}", "Q?"),
        ("{metadata[words][1]}>{metadata[n]}", "b>7"),
        ("{metadata[nested][key]} {{literal}}", "x {literal}"),
        ("no field", "no field"),
    ],
)
def test_a_template_shows_the_question_and_the_metadata(template, text):
    assert fill_template(template, ENTRY) == text


@pytest.mark.parametrize(
    "template",
    [
        "{answer}",
        "{}",
        "{0}",
        "{question.__class__}",
        "{metadata.keys}",
        "{metadata[words].append}",
        "{metadata[words][2]}",
        "{metadata[words][-1]}",
        "{metadata[missing]}",
        "{metadata[n][0]}",
        "{question!r}",
        "{question:>99999999}",
        "{question",
        "question}",
    ],
)
def test_a_template_can_do_nothing_else(template):
    with pytest.raises(BadInput, match=r"^\{|^the template"):
        fill_template(template, ENTRY)
