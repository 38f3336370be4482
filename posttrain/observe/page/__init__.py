"""report.html: one file without scripts and without anything from the network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import yaml

from posttrain.observe.metrics import Record
from posttrain.observe.page.accuracy import accuracy_section
from posttrain.observe.page.cost import cost_section
from posttrain.observe.page.curves import curves_section
from posttrain.observe.page.markup import Markup, element, joined
from posttrain.observe.page.parts import absent, document, section
from posttrain.observe.page.pipeline import pipeline_section
from posttrain.observe.page.rollout import rollout_section
from posttrain.observe.page.teachers import teachers_section
from posttrain.observe.page.tokens import tokens_section
from posttrain.observe.runview import RunView
from posttrain.observe.words import duration, number, percent, size
from posttrain.recipe.document import RecipeDumper

SAMPLE_PROMPTS = 3
"""Prompts shown for each domain: the first that were recorded, whatever came of them."""
SAMPLE_CHARACTERS = 1500
STATUS_TONES = {"finished": "good", "failed": "bad"}


def render_page(report: dict[str, Any], view: RunView, traces: Sequence[Record] = ()) -> str:
    """The page for `report` (of `build_report`), with curves and sample answers from `view`, rollouts from `traces`."""
    domains = list(report["recipe"].get("domains") or {})
    teachers, tokens = teachers_section(report), tokens_section(traces, list(view.stages))
    sections = [
        pipeline_section(report, domains),
        accuracy_section(report, domains),
        curves_section(view, domains),
        *([teachers] if teachers else []),
        rollout_section(report, view, domains),
        cost_section(report, view, domains),
        samples_section(view, domains),
        *([tokens] if tokens else []),
        reproduce_section(report),
    ]
    footer = f"Written by posttrain on {time.strftime('%Y-%m-%d %H:%M')} · report schema {report['schema']}"
    return document(f"{report['name']}: post-training report", _header(report, tokens is not None), sections, footer)


def _header(report: dict[str, Any], has_tokens: bool) -> Markup:
    status = report["status"]
    links = [("#pipeline", "Pipeline"), ("#accuracy", "Accuracy"), ("#curves", "Curves"), ("#rollout", "Rollout")]
    links += [("#cost", "Time and memory"), ("#samples", "Samples")]
    links += [*([("#tokens", "Token by token")] if has_tokens else []), ("#reproduce", "Reproduce")]
    domains = ", ".join(report["recipe"].get("domains") or {})
    return element(
        "header",
        element(
            "div",
            element("h1", report["name"]),
            element("span", status, class_=f"pill {STATUS_TONES.get(status, 'warn')}"),
            class_="title",
        ),
        element(
            "p", f"Base → experts for {domains or 'no domain'} → one student · seed {report['seed']}", class_="lead"
        ),
        element("dl", [element("div", tile) for tile in _tiles(report)], class_="tiles"),
        _notices(report),
        element(
            "nav",
            element("ul", [element("li", element("a", text, href=link)) for link, text in links]),
            aria_label="Sections",
        ),
        class_="top",
    )


def _tiles(report: dict[str, Any]) -> list[Markup]:
    means, rollout, resources = report["summary"]["mean_pass@1"], report["rollout"], report["resources"]
    kept = [values["retention"] for values in report["summary"]["domains"].values() if values["retention"] is not None]
    attempts = f"{report['attempts']} attempts, pauses left out" if report["attempts"] > 1 else "from start to end"
    pss = resources["peak_pss_bytes"]
    values = [
        ("Student accuracy", percent(means.get("student")), f"base {percent(means.get('base'))}, mean over domains"),
        ("Kept of the experts", percent(min(kept)) if kept else "–", "student ÷ expert, weakest domain"),
        ("Wall time", duration(report["wall_seconds"]), attempts),
        (
            "Peak memory",
            size(resources["peak_rss_bytes"]),
            f"{size(pss)} with shared pages once" if pss else "all processes",
        ),
        ("Rollout", number(rollout["tokens_per_second"]), "tokens/s"),
        ("Sampler − trainer", number(rollout["max_abs_logprob_diff"]), "largest log-prob difference"),
    ]
    return [
        joined(element("dt", name), element("dd", value, class_="value"), element("dd", note, class_="note"))
        for name, value, note in values
    ]


def _notices(report: dict[str, Any]) -> list[Markup]:
    notices = []
    failed = [stage for stage in report["stages"] if stage["status"] == "failed"]
    if report["status"] != "finished":
        reached = [stage["name"] for stage in report["stages"] if stage["status"] == "finished"]
        text = (
            f"This run is not complete (status: {report['status']}). Finished stages: {', '.join(reached) or 'none'}."
        )
        errors = [element("pre", f"{stage['name']}: {stage['error'] or 'failed'}") for stage in failed]
        if report["error"]:
            errors.append(element("pre", report["error"]))
        more = element("p", "Continue it with ", element("code", f"posttrain resume {report['run_directory']}"), ".")
        tone = "notice bad" if report["status"] == "failed" else "notice"
        notices.append(element("div", element("p", text), more, errors, class_=tone, role="note"))
    if report["warnings"]:
        count = len(report["warnings"])
        title = element("summary", f"{count} warning{'s' if count > 1 else ''}")
        text = element("pre", "\n".join(report["warnings"][:100]))
        notices.append(element("details", title, text, class_="notice", open=count <= 3))
    return notices


def samples_section(view: RunView, domains: list[str]) -> Markup:
    """The same prompts answered by the models, before and after."""
    by_prompt: dict[tuple[str, str], list[Record]] = {}
    for event in view.events.get("sample", []):
        by_prompt.setdefault((str(event.get("domain")), str(event.get("prompt"))), []).append(event)
    content: list[Markup] = []
    for domain in dict.fromkeys([*domains, *(domain for domain, _ in by_prompt)]):
        prompts = [(prompt, events) for (of, prompt), events in by_prompt.items() if of == domain][:SAMPLE_PROMPTS]
        if prompts:
            content += [
                element("h3", domain),
                *(_sample(prompt, events, list(view.stages)) for prompt, events in prompts),
            ]
    if not content:
        return section("samples", "Samples", absent("No sample answers were recorded."))
    note = f"The first {SAMPLE_PROMPTS} recorded held-out prompts of each domain, not chosen by result."
    return section("samples", "Samples", element("p", note, class_="lead"), content)


def _sample(prompt: str, events: list[Record], stages: list[str]) -> Markup:
    by_model: dict[str, Record] = {}
    for event in events:
        by_model.setdefault(str(event.get("model")), event)
    order = sorted(by_model, key=lambda name: stages.index(name) if name in stages else len(stages))
    answers = [joined(element("dt", name), element("dd", *_answer(by_model[name]))) for name in order]
    reference = next((str(event["reference"]) for event in events if event.get("reference") is not None), None)
    if reference is not None:
        answers.append(joined(element("dt", "reference"), element("dd", element("pre", _shortened(reference)))))
    return element("article", element("pre", _shortened(prompt)), element("dl", answers), class_="sample card")


def _answer(event: Record) -> list[Markup]:
    completion = str(event.get("completion", ""))
    text = element("pre", _shortened(completion)) if completion.strip() else element("span", "(empty)", class_="note")
    if event.get("correct") is None:
        return [text]
    right = bool(event["correct"])
    return [text, element("span", "✓ right" if right else "✗ wrong", class_=f"verdict {'good' if right else 'bad'}")]


def _shortened(text: str) -> str:
    cut = len(text) - SAMPLE_CHARACTERS
    return text if cut <= 0 else f"{text[:SAMPLE_CHARACTERS]} … ({cut:,} more characters)"


def reproduce_section(report: dict[str, Any]) -> Markup:
    """The command, the environment and the resolved recipe."""
    environment = dict(report["environment"])
    packages = environment.pop("packages", None)
    facts = {key.replace("_", " "): value for key, value in environment.items() if value is not None}
    if "memory bytes" in facts:
        facts["memory"] = size(facts.pop("memory bytes"))
    facts.update(packages if isinstance(packages, dict) else {})
    recipe = yaml.dump(report["recipe"], Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)
    return section(
        "reproduce",
        "Reproduce",
        element(
            "p",
            "The run's resolved recipe, seed included, is recipe.yaml in its directory and below. The same run again:",
        ),
        element("pre", f"posttrain run {report['run_directory']}/recipe.yaml", class_="command"),
        element("details", element("summary", "Recipe"), element("pre", recipe)),
        element("h3", "Environment"),
        element(
            "dl",
            [joined(element("dt", key), element("dd", str(value))) for key, value in facts.items()],
            class_="facts",
        ),
    )
