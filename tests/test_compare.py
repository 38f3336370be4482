"""`posttrain report A B`: accuracies, curves and recipes of runs side by side."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import BadInput
from posttrain.observe.compare import compare, differing_keys, write_comparison
from posttrain.observe.intervals import binomial_interval, difference_interval
from tests.observe_kit import finished_run, recipe, write_run
from tests.test_report import Page


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """The second run's base learned in half the steps, and its student is worse."""
    records = finished_run(seed=1)
    for record in records:
        if record.get("event") == "evaluated" and record["model"] == "student":
            right = round(0.6 * 256)
            record |= {"pass@1": right / 256, "ci95": list(binomial_interval(right, 256))}
    other = recipe(base={"kind": "sft", "steps": 60})
    for name in ("one", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "state.json").write_text("{}")
    first = write_run(tmp_path / "runs" / "one", finished_run())
    return first, write_run(tmp_path / "runs" / "other", records, other)


def test_a_comparison_has_every_accuracy_with_the_interval_of_its_difference(runs: tuple[Path, Path]) -> None:
    found = compare(runs)
    assert [run["label"] for run in found["runs"]] == ["one", "other"]
    rows = {(row["model"], row["domain"]): row for row in found["accuracy"]}
    assert len(rows) == 12
    student = rows["student", "letters"]
    (difference,) = student["differences"]
    assert difference["value"] == pytest.approx(student["cells"][1]["pass@1"] - student["cells"][0]["pass@1"])
    assert difference["ci95"][0] < difference["value"] < difference["ci95"][1] < 0, "0.6 against about 0.85 of 256"
    low, high = rows["base", "letters"]["differences"][0]["ci95"]
    assert low < 0 < high


def test_modes_are_compared_as_well(tmp_path: Path) -> None:
    modes = {"high": {"pass@1": 0.75, "n": 64, "ci95": list(binomial_interval(48, 64))}}
    event = {"time": 1.0, "event": "evaluated", "model": "base", "domain": "letters", "pass@1": 0.5, "n": 64}
    paths = [write_run(tmp_path / name, [{**event, "modes": modes}]) for name in ("a", "b")]
    rows = {(row["model"], row["domain"]): row["differences"][0]["value"] for row in compare(paths)["accuracy"]}
    assert rows == {("base", "letters"): 0.0, ("base", "letters, high"): 0.0}


def test_it_names_the_keys_of_the_recipe_that_differ_and_no_other(runs: tuple[Path, Path]) -> None:
    assert compare(runs)["recipe"] == [{"key": "stages.base.steps", "values": [120, 60]}]
    documents = [{"a": [1, {"b": 2}], "name": "x"}, {"a": [1, {"b": True}, 3], "name": "y", "c": {}}]
    assert differing_keys(documents) == [
        {"key": "a[1].b", "values": [2, True]},
        {"key": "a[2]", "values": ["(absent)", 3]},
        {"key": "c", "values": ["(absent)", {}]},
    ]


def test_the_page_shows_tables_curves_and_the_recipes_difference(runs: tuple[Path, Path]) -> None:
    _, path = write_comparison(runs)
    assert path == runs[1] / "compared-with-one.html"
    page = Page(path.read_text())
    labels = " ".join(svg.get("aria-label", "") for svg in page.all("svg"))
    assert "student: KL, nats a token. one: from" in labels and "base: loss. " in labels
    for text in ("one against other", "stages.base.steps", "120", "60", "Environments are the same."):
        assert text in page.text
    assert not page.all("script") and len(page.all("caption")) == len(page.all("table"))
    assert {link["href"][1:] for link in page.all("a")} <= {attributes.get("id") for _, attributes, _ in page.elements}


def test_the_command_prints_the_table_and_where_the_page_is(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs[0].parent.parent)
    done = CliRunner().invoke(app, ["report", "one", "runs/other"])
    assert done.exit_code == 0, done.output
    assert "stages.base.steps: 120 → 60" in done.output and "runs/other/compared-with-one.html" in done.output
    (line,) = [line for line in done.output.splitlines() if "student" in line and "letters" in line]
    assert "60.2 %" in line and " to −" in line


def test_one_run_cannot_be_compared_with_itself_but_three_can_be_compared(runs: tuple[Path, Path]) -> None:
    with pytest.raises(BadInput, match="given twice"):
        compare([runs[0], runs[0].parent / "other" / ".." / "one"])
    third = write_run(runs[0].parent.parent / "elsewhere" / "one", [])
    found = compare([*runs, third])
    assert [run["label"] for run in found["runs"]] == [str(runs[0]), "other", str(third)]
    assert all(row["cells"][2] is None and row["differences"][1] is None for row in found["accuracy"])
    assert write_comparison([*runs, third])[1].name == "compared-with-one-other.html"


def test_runs_without_any_result_are_compared_as_far_as_they_came(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, []) for name in ("a", "b")]
    page = Page(write_comparison(paths)[1].read_text())
    assert "No model has been evaluated" in page.text and "No step was recorded" in page.text


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe (1998), table II, example (a): 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    first, second = binomial_interval(48, 80), binomial_interval(56, 70)
    low, high = difference_interval(48 / 80, first, 56 / 70, second)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


@given(st.integers(1, 500), st.integers(1, 500), st.data())
def test_the_interval_of_a_difference_holds_it_and_changes_sides_with_it(n: int, m: int, data: st.DataObject) -> None:
    one, other = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    intervals = binomial_interval(one, n), binomial_interval(other, m)
    low, high = difference_interval(one / n, intervals[0], other / m, intervals[1])
    assert -1 <= low <= other / m - one / n <= high <= 1
    back = difference_interval(other / m, intervals[1], one / n, intervals[0])
    assert math.isclose(back[0], -high, abs_tol=1e-12) and math.isclose(back[1], -low, abs_tol=1e-12)
