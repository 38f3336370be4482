"""report.json, report.html, `posttrain status` and the table at the end of a run."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from posttrain.errors import BadInput
from posttrain.observe.intervals import binomial_interval
from posttrain.observe.page.charts import Scale, Series, line_chart, thinned
from posttrain.observe.page.markup import element, joined
from posttrain.observe.report import build_report, write_report
from posttrain.observe.status import final_table, render_status
from tests.observe_kit import START, finished_run, recipe, traces, write_run

VOID = {"meta", "wbr", "line", "rect", "circle", "path", "polyline"}
DOMAINS = ("arithmetic", "letters")


class Page(HTMLParser):
    """Checks that a page is well formed while reading it, and keeps its elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, f"<{tag}/> is not an empty element"
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text())


def partial_run() -> list[dict[str, Any]]:
    """The run died while the experts were learning."""
    records = [record for record in finished_run() if record["time"] < START + 230]
    error = "the rollout worker died: <b>out of memory</b>"
    records.append({"time": START + 231, "event": "stage_failed", "stage": "expert/letters/grpo", "error": error})
    records.append({"time": START + 232, "event": "run_finished", "status": "failed", "error": error})
    return records


# --- report.json


def test_the_report_has_what_the_contract_names(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny-v4", finished_run())
    write_report(run)
    report = json.loads((run / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert (report["schema"], report["name"], report["seed"], report["status"]) == (1, "tiny-v4", 7, "finished")
    assert report["recipe"]["stages"]["base"]["steps"] == 120 and report["recipe"]["name"] == "tiny-v4"
    assert report["wall_seconds"] == pytest.approx(600, abs=1)
    experts = [f"expert/{domain}/{kind}" for domain in DOMAINS for kind in ("sft", "grpo")]
    assert [model["name"] for model in report["models"]] == ["base", *experts, "student"]
    for model in report["models"]:
        assert model["checkpoint"].startswith("runs/tiny-v4/checkpoints/")
        assert set(model["eval"]) == set(DOMAINS)
        for cell in model["eval"].values():
            low, high = cell["ci95"]
            assert low < cell["pass@1"] < high and cell["n"] == 256
    rollout = report["rollout"]
    assert rollout["tokens_per_second"] == pytest.approx(3 * 240_000 / (0.6 * (190 + 190 + 210)))
    assert (rollout["max_abs_logprob_diff"], rollout["k3"]) == (3.1e-6, pytest.approx(4.2e-9))
    assert rollout["weight_sync_seconds_median"] == pytest.approx(0.13)
    assert report["resources"]["peak_rss_bytes"] == int(4.6 * 2**30)
    assert report["resources"]["peak_pss_bytes"] < report["resources"]["peak_rss_bytes"]
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (stages["student"]["seconds"], stages["student"]["steps"], stages["student"]["status"]) == (
        210,
        150,
        "finished",
    )
    assert 0 < stages["student"]["metrics"]["kl"] < 0.1
    assert stages["expert/letters/grpo"]["start_seconds"] == pytest.approx(155)
    assert report["environment"]["packages"]["torch"] == "2.13.0"
    assert len(report["gates"]) == 2 and report["gates"][0]["passed"] is True
    assert build_report(run) == report


def test_what_a_stage_says_of_its_rollouts_comes_before_what_its_steps_say(tmp_path: Path) -> None:
    facts = {"tokens": 300, "seconds": 2.0, "k3": 0.5}
    records = [
        {"time": 1, "event": "rollout_stats", "stage": "student", "max_abs_logprob_diff": 1e-7, **facts},
        {"time": 2, "event": "rollout_stats", "stage": "expert/letters/grpo", "tokens": 100, "seconds": 2.0, "k3": 0.1},
        {"time": 3, "event": "weights_published", "version": 1, "seconds": 0.25},
    ]
    rollout = build_report(write_run(tmp_path / "run", records))["rollout"]
    assert rollout["tokens_per_second"] == 100 and rollout["k3"] == pytest.approx(0.4)
    assert rollout["weight_sync_seconds_median"] == 0.25


def test_a_run_from_given_weights_and_a_dropped_expert_are_told_as_such(tmp_path: Path) -> None:
    records = [record for record in finished_run() if record.get("stage") != "base"]
    for record in records:
        if record.get("event") == "gate" and record["domain"] == "letters":
            record |= {"passed": False, "action": "drop", "gain": 0.05}
    run = write_run(tmp_path / "run", records, recipe(base=None))
    records = [
        record for record in finished_run() if record.get("stage") == "base" and record.get("event") == "evaluated"
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    stages = {stage["name"]: stage["status"] for stage in build_report(run)["stages"]}
    assert build_report(run)["warnings"] == ["expert/letters/grpo did not pass its gate: it gained 5.0 of 10.0 points"]
    assert stages["base"] == "given" and stages["expert/letters/grpo"] == "dropped"
    page = page_of(run)
    assert "initial weights" in page.text and "– dropped" in page.text and "not passed (drop)" in page.text


def test_the_summary_compares_base_expert_and_student() -> None:
    from posttrain.observe.report import _summary

    def model(name: str, **shares: float) -> dict[str, Any]:
        return {"name": name, "eval": {domain: {"pass@1": share} for domain, share in shares.items()}}

    models = [model("base", a=0.2, b=0.1), model("expert/a/sft", a=0.5), model("expert/a/grpo", a=0.8, b=0.0)]
    summary = _summary([*models, model("student", a=0.76, b=0.5)], ["a", "b"], {})
    assert summary["domains"]["a"] == {
        "base": 0.2,
        "expert": 0.8,
        "student": 0.76,
        "gain": pytest.approx(0.6),
        "retention": pytest.approx(0.95),
    }
    assert summary["domains"]["b"] == {"base": 0.1, "expert": None, "student": 0.5, "gain": None, "retention": None}
    assert summary["mean_pass@1"] == {
        "base": pytest.approx(0.15),
        "expert/a/grpo": pytest.approx(0.4),
        "student": pytest.approx(0.63),
    }, "a mean only over all domains"
    joint = _summary(models, ["a", "b"], {"a": ["b"]})["domains"]["b"]
    assert joint["expert"] == 0.0 and joint["gain"] == pytest.approx(-0.1), "the expert of a learns b as well"


def test_a_failed_run_says_how_far_it_came(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", partial_run())
    report = build_report(run)
    assert report["status"] == "failed" and "out of memory" in report["error"]
    stages = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert stages["base"] == "finished" and stages["expert/letters/grpo"] == "failed"
    assert stages["expert/arithmetic/grpo"] == "interrupted" and stages["student"] == "pending"
    assert [model["name"] for model in report["models"]] == ["base", "expert/arithmetic/sft", "expert/letters/sft"]
    assert report["rollout"]["tokens_per_second"] is None
    assert report["summary"]["domains"]["letters"]["student"] is None


def test_a_run_without_records_is_not_started_and_one_without_an_end_unfinished(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", [])
    assert build_report(empty)["status"] == "not started" and build_report(empty)["wall_seconds"] is None
    killed = write_run(tmp_path / "killed", finished_run()[:200])
    assert build_report(killed)["status"] == "unfinished"
    (killed / "state.json").write_text('{"status": "interrupted"}')
    assert build_report(killed)["status"] == "interrupted"
    (killed / "state.json").write_text('{"status": ')
    assert build_report(killed)["status"] == "unfinished"


def test_torn_lines_nulls_and_wrong_types_do_not_stop_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished_run())
    strange = [
        '{"time": 1700000300, "stage": "student", "step": 3, "metrics": {"kl": null}, "warning": "not finite: kl"}',
        '{"time": null, "event": "evaluated", "model": "base", "domain": "letters", "pass@1": null}',
        '{"event": "rollout_stats", "tokens": "many", "seconds": null, "weight_sync_seconds": null}',
        '{"event": "resources", "peak_rss_bytes": null, "peak_by_process_kind": {"driver": null}}',
        '{"event": 7}',
        '{"stage": "base", "metrics": [1]}',
        '{"time": 1700000301, "stage": "student", "st',
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(strange))
    report = build_report(run)
    assert report["models"][0]["eval"]["letters"]["n"] == 256
    assert report["resources"]["peak_rss_bytes"] == int(4.6 * 2**30)
    assert any("not finite: kl" in warning for warning in report["warnings"])
    assert page_of(run).all("svg")


def test_a_missing_interval_is_computed_and_peaks_of_attempts_are_joined(tmp_path: Path) -> None:
    records = [
        {"time": 0, "event": "run_started"},
        {"time": 1, "event": "resources", "peak_rss_bytes": 900, "cpu_seconds": 50.0},
        {"time": 2, "event": "run_started"},
        {"time": 3, "event": "resources", "peak_rss_bytes": 500, "cpu_seconds": 4.0},
        {"time": 4, "event": "resources", "peak_rss_bytes": 600, "cpu_seconds": 9.0},
        {"time": 5, "event": "evaluated", "model": "base", "domain": "letters", "pass@1": 0.25, "n": 64},
    ]
    report = build_report(write_run(tmp_path / "run", records))
    assert report["models"][0]["eval"]["letters"]["ci95"] == pytest.approx(list(binomial_interval(16, 64)))
    assert report["resources"]["peak_rss_bytes"] == 900 and report["resources"]["cpu_seconds"] == 59
    assert report["attempts"] == 2 and report["wall_seconds"] == 4


def test_a_directory_that_is_no_run_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (build_report, write_report, render_status):
        with pytest.raises(BadInput, match=r"elsewhere is not a run directory.*recipe\.yaml"):
            call(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


# --- report.html


@pytest.mark.parametrize("records", [finished_run(), partial_run(), []], ids=["finished", "failed", "not started"])
def test_the_page_is_well_formed_self_contained_and_accessible(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    run = write_run(tmp_path / "run", records)
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 1_000_000
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "link", "iframe", "img", "object")
        assert "src" not in attributes and attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    source = (run / "report.html").read_text()
    assert "url(" not in source and "@import" not in source
    assert page.all("html")[0]["lang"] == "en" and page.all("meta")[0] == {"charset": "utf-8"}
    assert any("width=device-width" in meta.get("content", "") for meta in page.all("meta"))
    names = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(set(names)) == len(names)
    assert {link["href"][1:] for link in page.all("a")} <= set(names)
    headings = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1 and headings[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(headings))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and len(svg["aria-label"]) > 20)
    captions = sum(tag == "figcaption" and parents[-1] == "figure" for tag, _, parents in page.elements)
    assert captions == len(page.all("figure"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_the_page_shows_results_curves_and_samples(tmp_path: Path) -> None:
    records = finished_run()
    page = page_of(write_run(tmp_path / "run", records))
    report = build_report(tmp_path / "run")
    for model in report["models"]:
        for cell in model["eval"].values():
            assert f"{100 * cell['pass@1']:.1f} %" in page.text
            assert f"{100 * cell['ci95'][0]:.1f}–{100 * cell['ci95'][1]:.1f}" in page.text
    labels = " ".join(svg.get("aria-label", "") for svg in page.all("svg"))
    for title in ("Supervised loss", "Reward in GRPO", "KL to the teachers", "Entropy", "Completion length"):
        assert f"{title}. " in labels
    assert (
        "student: letters: from" in labels and "Rollout against trainer. " in labels and "Memory over time. " in labels
    )
    assert "pass@1 on letters: base 2" in labels
    assert "arithmetic: 0 + 17 = ?" in page.text and "✗ wrong" in page.text and "✓ right" in page.text
    assert "4 + 17" not in page.text, "the first three prompts of a domain"
    assert "posttrain run" in page.text and "reasoning_gym: chain_sum" in page.text and "0123456789abcdef" in page.text


def test_the_page_says_who_waited_and_how_old_the_samples_were(tmp_path: Path) -> None:
    records, stage = finished_run(), "expert/letters/grpo"
    off_policy = {"staleness_mean": 0.75, "staleness_max": 2, "staleness_masked": 0.015, "importance_ratio_raw": 1.07,
                  "importance_bounded": 0.022}  # fmt: skip
    for record in records:
        if record.get("stage") == stage and "metrics" in record:
            record["metrics"] |= {"staleness_mean": 0.75, "importance_ratio_raw": 1.07}
        if record.get("stage") == stage and record.get("event") == "rollout_stats":
            record |= {"trainer_idle": 0.031, "generators_idle": 0.124, "off_policy": off_policy}
    page = page_of(write_run(tmp_path / "run", records))
    assert "Waiting and age" in page.text
    for cell in ("3.1 %", "12.4 %", "0.75", "1.5 %", "1.07", "2.2 %"):
        assert cell in page.text
    labels = " ".join(svg.get("aria-label", "") for svg in page.all("svg"))
    assert "Age of the samples. " in labels and "Importance ratio. " in labels
    synchronous = page_of(write_run(tmp_path / "other", finished_run()))
    assert "Waiting and age" not in synchronous.text and "Age of the samples" not in synchronous.text


def test_the_page_of_a_failed_run_says_what_is_missing_and_how_to_go_on(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", partial_run()))
    assert "This run is not complete (status: failed)" in page.text
    assert "expert/letters/grpo: the rollout worker died: <b>out of memory</b>" in page.text
    assert f"posttrain resume {tmp_path / 'run'}" in page.text
    assert "No model has been evaluated." in page.text and "No sample answers were recorded." in page.text
    assert "Nothing was recorded for: KL to the teachers." in page.text


def test_text_from_models_and_users_is_shown_and_never_taken_for_markup(tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" ' & \x00\x1b[31m \ud800"
    stage = "expert/arithmetic/<svg onload=alert(3)>"
    records = [
        *finished_run(),
        {
            "time": START + 590,
            "event": "sample",
            "model": attack,
            "domain": "letters",
            "prompt": attack,
            "completion": attack,
        },
        {"time": START + 591, "event": "warning", "stage": "base", "message": attack},
        {"time": START + 592, "stage": stage, "step": 1, "steps": 2, "metrics": {"loss": 1.0}},
        {"time": START + 593, "event": "evaluated", "model": stage, "domain": "letters", "pass@1": 0.5, "n": 4},
    ]
    records = [record for record in records if record.get("event") != "sample" or record["model"] == attack]
    page = page_of(write_run(tmp_path / "run", records))
    shown = attack.replace("\x00", "�").replace("\x1b", "�").replace("\ud800", "�")
    assert page.text.count(shown) == 4, "warning, prompt, model and answer"
    assert not page.all("script") and not page.all("img") and stage in page.text


@given(st.text(), st.text())
def test_any_text_comes_back_from_an_element_as_it_was(text: str, attribute: str) -> None:
    page = Page(element("p", text, title=attribute))
    forbidden = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
    assert page.text.replace("\r", "\n") == forbidden.sub("�", text).replace("\r", "\n")
    assert page.all("p")[0]["title"].replace("\r", "\n") == forbidden.sub("�", attribute).replace("\r", "\n")


def test_elements_nest_and_leave_out_what_is_absent() -> None:
    markup = element("ul", [element("li", 1, None, "<"), [element("li", "b")]], class_="x", hidden=True, id=None)
    assert markup == '<ul class="x" hidden><li>1&lt;</li><li>b</li></ul>'
    assert joined("a", None, ["&"]) == "a&amp;"
    assert element("line", x1=1.5, aria_hidden="true") == '<line x1="1.5" aria-hidden="true"/>'


def test_a_long_run_keeps_its_page_small_and_its_peaks(tmp_path: Path) -> None:
    peak = (700.0, 99.0)
    points = [(float(step), 1.0 if step != 700 else 99.0) for step in range(20_000)]
    assert len(thinned(points)) < 400 and peak in thinned(points)
    records = [
        {"time": START + step, "stage": "base", "step": step, "steps": 10_000, "metrics": {"loss": 1 / step}}
        for step in range(1, 10_001)
    ]
    run = write_run(tmp_path / "run", records)
    assert page_of(run) and (run / "report.html").stat().st_size < 200_000


@pytest.mark.parametrize(
    "values", [[0.0], [0.0, 0.0], [5.0, 5.0, 5.0], [-3e-12, 2e-12], [1e30, -1e30], [1e-300, 2e-300]]
)
@pytest.mark.parametrize("log_floor", [None, 1e-9])
def test_charts_can_draw_any_range(values: list[float], log_floor: float | None) -> None:
    series = Series("line", [(float(index), value) for index, value in enumerate(values)], "c0")
    chart = line_chart("Chart", "", [series], zero=log_floor is None, log_floor=log_floor, limit=1e-5)
    page = Page(chart)
    numbers = [
        float(number) for line in page.all("polyline") for pair in line["points"].split() for number in pair.split(",")
    ]
    numbers += [float(circle[key]) for circle in page.all("circle") for key in ("cx", "cy")]
    assert numbers and all(math.isfinite(number) and -1 <= number <= 361 for number in numbers)


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert Scale(0.0, 3.5, 0, 1).ticks(4) == [0, 1, 2, 3]
    assert Scale(1e-9, 1e-4, 0, 1, log=True).ticks(4) == pytest.approx([1e-9, 1e-7, 1e-5])


# --- terminal


def test_the_final_table_has_models_accuracy_time_and_the_reports_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished_run())
    out = io.StringIO()
    Console(file=out, width=100).print(final_table(build_report(run)))
    text = out.getvalue()
    student = next(line for line in text.splitlines() if "student" in line)
    cell = build_report(run)["models"][-1]["eval"]["letters"]
    low, high = (100 * bound for bound in cell["ci95"])
    assert f"{100 * cell['pass@1']:.1f} % ({low:.1f}–{high:.1f})" in student and "3m 30s" in student
    assert "4.60 GiB" in text and f"Report: {run / 'report.html'}" in text
    Console(file=io.StringIO(), width=40).print(final_table(build_report(write_run(tmp_path / "empty", []))))


def test_status_in_a_pipe_is_one_plain_line_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_status(write_run(tmp_path / "run", partial_run()))
    out = capsys.readouterr().out
    lines = {line.split("\t")[0]: line.split("\t")[1:] for line in out.splitlines()[1:]}
    assert out.startswith("tiny-v4: failed after 3m 52s: the rollout worker died")
    assert lines["base"][:3] == ["finished", "120/120", "1m 35s"] and lines["student"][0] == "pending"
    assert lines["expert/letters/grpo"][0] == "failed" and "reward" in lines["expert/letters/grpo"][-1]
    assert "\x1b" not in out
    render_status(write_run(tmp_path / "killed", finished_run()[:300]))
    assert "perhaps killed, `posttrain resume` continues it" in capsys.readouterr().out


# --- token by token


def test_the_page_shows_rollouts_token_by_token(tmp_path: Path) -> None:
    found = traces()
    page = page_of(write_run(tmp_path / "run", finished_run(), traced=found))
    assert {"href": "#tokens"} in page.all("a")
    student = next(trace for trace in found if trace["stage"] == "student")
    assert "step 1 · arithmetic · reward 1" in page.text and "KL to letters" in page.text
    assert "exact 1, length -0.125" in page.text and "KL to the reference" in page.text and "… 20 more" in page.text
    tints = [span for span in page.all("span") if re.fullmatch(r"t( p\d| k\d| given)?", span.get("class", ""))]
    probability = f"{100 * math.exp(student['sampler'][0]):.1f} %"
    assert any(span.get("title", "").startswith(f"{probability}, log-prob") for span in tints)
    assert {span["class"] for span in tints} == {"t given", *(f"t {kind}{tint}" for kind in "pk" for tint in range(5))}
    assert "#tokens" not in {link["href"] for link in page_of(write_run(tmp_path / "other", finished_run())).all("a")}


def test_a_repeated_stage_shows_its_latest_traces_and_strange_ones_are_passed_over(tmp_path: Path) -> None:
    first, again = traces(("letters",)), traces(("letters",))
    for trace in again:
        trace["prompt"] = "asked again"
    strange = [
        {"event": "trace"},
        {"event": "trace", "stage": "student", "step": "1", "tokens": []},
        {"event": "trace", "stage": "elsewhere", "step": 1, "tokens": ["x"]},
        {"event": "trace", "stage": "student", "step": 200, "tokens": ["x", "y"], "sampler": [None], "kl": "no"},
    ]
    run = write_run(tmp_path / "run", finished_run(("letters",)), recipe(("letters",)), [*first, *again, *strange])
    page = page_of(run)
    assert page.text.count("asked again") == 8, "six of GRPO's two samples in three steps, two of the student's three"
    assert "letters: 25 + 17" not in page.text and "step 200" in page.text


def test_many_long_rollouts_do_not_make_the_page_large(tmp_path: Path) -> None:
    domains = tuple(f"domain{number}" for number in range(20))
    found = traces(domains)
    for trace in found:
        for key in ("tokens", "sampled", "sampler", "trainer", "kl", "versions"):
            trace[key] = trace[key] * 10
    run = write_run(tmp_path / "run", finished_run(domains), recipe(domains), found)
    assert page_of(run) and (run / "report.html").stat().st_size < 3_000_000
