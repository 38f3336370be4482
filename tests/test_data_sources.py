"""A user's own problems: JSONL files and `datasets` data sets, good rows and bad ones."""

from __future__ import annotations

import json

import datasets
import pytest

from posttrain.data import load_domain
from posttrain.data.sources import read_dataset, read_jsonl
from posttrain.errors import BadInput
from posttrain.recipe.domains import DatasetSource, DomainConfig

ROWS = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(30)]


def write(path, rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_prompts_and_conversations_are_read_in_order_with_their_other_fields(tmp_path):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello é"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "1+1"},
    ]
    rows = ["", {"prompt": "2+2", "answer": 4, "level": "easy"}, "  ", {"messages": conversation, "answer": "2"}]
    first, second = read_jsonl("d", write(tmp_path / "rows.jsonl", rows), "Add.")
    assert first.messages == ({"role": "system", "content": "Add."}, {"role": "user", "content": "2+2"})
    assert first.answer == "4" and first.entry["level"] == "easy"
    assert second.messages == tuple(conversation), "its own system text goes before the domain's"


def test_equal_rows_are_one_problem(tmp_path):
    assert len(read_jsonl("d", write(tmp_path / "rows.jsonl", ROWS + ROWS), None)) == 30


def test_the_same_question_under_another_system_text_is_another_problem(tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": task}, {"role": "user", "content": "cat"}], "answer": answer}
        for task, answer in (("backwards", "tac"), ("length", "3"))
    ]
    assert [p.answer for p in read_jsonl("d", write(tmp_path / "rows.jsonl", rows), None)] == ["tac", "3"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "not JSON: Expecting"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a row is an object with `prompt` and `answer`, not list"),
        ({"answer": "1"}, "either `prompt` or `messages`"),
        ({"prompt": "a", "messages": [], "answer": "1"}, "not both"),
        ({"prompt": 3, "answer": "1"}, "`prompt` is text, not int"),
        ({"prompt": "  ", "answer": "1"}, "not empty"),
        ({"messages": [], "answer": "1"}, "at least one message"),
        ({"messages": "hello", "answer": "1"}, "`messages` is a list"),
        ({"messages": ["hello"], "answer": "1"}, "messages[0] is an object whose `role` is one of system, user"),
        ({"messages": [{"role": "tool", "content": "a"}], "answer": "1"}, "messages[0] is an object whose `role`"),
        ({"messages": [{"role": "user", "content": ["a"]}], "answer": "1"}, "messages[0].content is text, not list"),
        ({"messages": [{"role": "assistant", "content": "a"}], "answer": "1"}, "ends with a user message"),
        ({"prompt": "a"}, "`answer` is text or a number; it is missing"),
        ({"prompt": "a", "answer": ["1"]}, "`answer` is text or a number"),
        ({"prompt": "a", "answer": True}, "`answer` is text or a number"),
        ({"prompt": "a", "answer": " "}, "`answer` is empty"),
        ({"prompt": "What is 3?", "answer": "4"}, "the prompt of {path}:4 with another answer: '4' instead of '3'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_and_reason(tmp_path, row, complaint):
    path = write(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(BadInput) as caught:
        read_jsonl("d", path, None)
    assert "domains.d.source has bad rows:" in str(caught.value)
    assert f"{path}:31: " in str(caught.value)
    assert complaint.format(path=path) in str(caught.value)


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xff", "answer": "b"}\n')
    with pytest.raises(BadInput, match=r"rows.jsonl:2: not UTF-8: invalid start byte"):
        read_jsonl("d", str(path), None)


def test_five_bad_rows_are_shown_at_once(tmp_path):
    path = write(tmp_path / "rows.jsonl", ["{", *ROWS[:2], *["[]"] * 9])
    with pytest.raises(BadInput) as caught:
        read_jsonl("d", path, None)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[1:6]] == ["1", "4", "5", "6", "7"]
    assert lines[6].strip() == "(later rows were not checked)" and len(lines) == 7


def test_a_missing_or_empty_file_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"domains.d.source: there is no file '.*absent.jsonl'"):
        read_jsonl("d", str(tmp_path / "absent.jsonl"), None)
    with pytest.raises(BadInput, match=r"domains.d.source: '.*empty.jsonl' holds no problems"):
        read_jsonl("d", write(tmp_path / "empty.jsonl", ["", " "]), None)


def test_a_jsonl_domain_loads_with_and_without_a_holdout_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    other = write(tmp_path / "test.jsonl", [{"prompt": f"Test {i}", "answer": i} for i in range(6)])
    sizes = {"train": 100, "selection": 4, "holdout": 6}
    data = load_domain("d", DomainConfig(source={"jsonl": path}, **sizes), 0)
    assert (len(data.train), len(data.selection), len(data.holdout)) == (20, 4, 6)
    data = load_domain("d", DomainConfig(source={"jsonl": path, "holdout_jsonl": other}, **sizes), 0)
    assert (len(data.train), len(data.selection), len(data.holdout)) == (26, 4, 6)
    assert all(problem.messages[0]["content"].startswith("Test") for problem in data.holdout)


@pytest.fixture
def saved(tmp_path):
    """The same rows as a saved data set, a saved dictionary of splits, and a directory of files."""
    table = datasets.Dataset.from_list(
        [{"question": r["prompt"], "solution": r["answer"], "answer": "?"} for r in ROWS]
    )
    table.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    table.to_json(tmp_path / "files" / "train.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("directory", "split", "count"), [("single", "train", 30), ("splits", "test", 5), ("files", "train", 30)]
)
def test_a_local_data_set_gives_the_same_problems_as_a_file(saved, directory, split, count, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", saved / "cache")
    source = DatasetSource(
        dataset=str(saved / directory), split=split, prompt_field="question", answer_field="solution"
    )
    problems = read_dataset("d", source, None)
    expected = read_jsonl("d", write(saved / "rows.jsonl", ROWS[:count]), None)
    assert [(p.id, p.messages, p.answer) for p in problems] == [(p.id, p.messages, p.answer) for p in expected]


def test_a_data_set_of_conversations(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Say {i}"}], "answer": i} for i in range(3)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    problems = read_dataset("d", DatasetSource(dataset=str(tmp_path / "data")), "Be brief.")
    assert [p.messages[-1]["content"] for p in problems] == ["Say 0", "Say 1", "Say 2"]
    assert problems[0].messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"split": "dev"}, r"the data set '.*' has no split 'dev'; it has train, test"),
        ({"prompt_field": "q"}, r"domains.d.source.prompt_field: '.*' has no column 'q'; it has question, solution"),
        ({"answer_field": "a"}, r"domains.d.source.answer_field: '.*' has no column 'a'"),
        ({"dataset": "./absent/directory"}, r"the data set './absent/directory' could not be loaded"),
    ],
)
def test_a_wrong_data_set_split_or_column_is_bad_input(saved, change, complaint):
    good = {"dataset": str(saved / "splits"), "prompt_field": "question", "answer_field": "solution"}
    with pytest.raises(BadInput, match=complaint):
        read_dataset("d", DatasetSource(**{**good, **change}), None)


def test_a_bad_row_of_a_data_set_is_named_by_its_index(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": None, "answer": "1"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(BadInput, match=r"data\[1\]: `prompt` is text, not NoneType"):
        read_dataset("d", DatasetSource(dataset=str(tmp_path / "data")), None)
