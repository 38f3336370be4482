"""Single rollouts token by token: how likely each token was, how far the policy is from its teacher, what it earned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from posttrain.observe.metrics import Record
from posttrain.observe.page.markup import Markup, element, joined
from posttrain.observe.page.parts import section
from posttrain.observe.runview import is_number
from posttrain.observe.words import number, percent

PAGE_TOKENS = 4000
"""Tokens on the page in all; each of many rollouts is cut after its share."""
LEAST_TOKENS = 32
SHOWN_STEPS = 3
PROBABILITIES = (0.9, 0.5, 0.2, 0.05)
"""Lower bounds of the tints p0 to p3; p4 is below."""
DIVERGENCES = (0.01, 0.1, 0.5, 2.0)
"""Upper bounds, in nats, of the tints k0 to k3; k4 is above."""
MEASURES = {"reverse_kl": "KL", "forward_kl": "forward KL", "jsd": "Jensen–Shannon divergence"}


def tokens_section(traces: Sequence[Record], stages: Sequence[str]) -> Markup | None:
    """A part for each stage that sampled; None when there are no traces."""
    by_stage = _by_stage(traces)
    shown = {stage: _spread(by_stage[stage]) for stage in stages if stage in by_stage}
    count = sum(len(found) for found in shown.values())
    if not count:
        return None
    limit = max(LEAST_TOKENS, PAGE_TOKENS // count)
    content: list[Markup] = [element("p", _LEAD, class_="lead"), _key()]
    for stage, found in shown.items():
        content.append(element("h3", stage))
        content += [_trace(trace, limit, first=index == 0) for index, trace in enumerate(found)]
    return section("tokens", "Token by token", content)


_LEAD = (
    "A few samples as they were learned from. Every token has the tint of its probability when it was sampled, and "
    "below, where it was measured, that of the divergence at its place. Pointing at a token shows its numbers."
)


def _by_stage(traces: Sequence[Record]) -> dict[str, dict[int, list[Record]]]:
    """Stage → step → traces; a stage that was repeated has replaced its steps."""
    found: dict[str, dict[int, list[Record]]] = {}
    last: dict[str, int] = {}
    for trace in traces:
        stage, step = trace.get("stage"), trace.get("step")
        if not isinstance(stage, str) or not isinstance(step, int) or not isinstance(trace.get("tokens"), list):
            continue
        if last.get(stage) != step:
            found.setdefault(stage, {})[step] = []
        last[stage] = step
        found[stage][step].append(trace)
    return found


def _spread(by_step: dict[int, list[Record]]) -> list[Record]:
    """The traces of the first step, of the last, and of one between."""
    steps = sorted(by_step)
    chosen = steps if len(steps) <= SHOWN_STEPS else [steps[0], steps[len(steps) // 2], steps[-1]]
    return [trace for step in chosen for trace in by_step[step]]


def _key() -> Markup:
    probabilities = [f"≥ {PROBABILITIES[0]:g}", *(f"≥ {bound:g}" for bound in PROBABILITIES[1:]), "less"]
    divergences = ["< 0.01", *(f"< {bound:g}" for bound in DIVERGENCES[1:]), "more"]

    def swatches(kind: str, words: Sequence[str]) -> list[Markup]:
        return [element("span", word, class_=f"t {kind}{index}") for index, word in enumerate(words)]

    return element(
        "dl",
        joined(element("dt", "probability"), element("dd", swatches("p", probabilities))),
        joined(element("dt", "divergence, nats"), element("dd", swatches("k", divergences))),
        class_="key",
    )


def _trace(trace: Record, limit: int, first: bool) -> Markup:
    tokens = [str(token) for token in trace["tokens"]][:limit]
    left = int(trace.get("length") or len(tokens)) - len(tokens)
    rest = element("span", f" … {left} more", class_="note") if left > 0 else None
    sampler, kl = _numbers(trace, "sampler"), _numbers(trace, "kl")
    lines = [_line("probability", [_probable(trace, index, text) for index, text in enumerate(tokens)], rest)]
    if any(value is not None for value in kl[: len(tokens)]):
        marks = [_diverging(kl, index, text) for index, text in enumerate(tokens)]
        lines.append(_line(_measure(trace), marks, rest))
    reward = f" · reward {number(trace['reward'])}" if is_number(trace.get("reward")) else ""
    domain = f" · {trace['domain']}" if trace.get("domain") else ""
    summary = element("summary", f"step {trace['step']}{domain}{reward}")
    facts = [joined(element("dt", name), element("dd", value)) for name, value in _facts(trace, tokens, sampler, kl)]
    return element(
        "details",
        summary,
        element("pre", str(trace.get("prompt", ""))),
        lines,
        element("dl", facts, class_="facts"),
        class_="trace card",
        open=first,
    )


def _measure(trace: Record) -> str:
    measure = MEASURES.get(str(trace.get("measure", "reverse_kl")), str(trace.get("measure")))
    return f"{measure} to {trace['kl_to']}" if trace.get("kl_to") else measure


def _line(label: str, marks: Sequence[Markup], rest: Markup | None) -> Markup:
    return element("div", element("span", label, class_="note"), element("p", marks, rest, class_="tokens"))


def _probable(trace: Record, index: int, text: str) -> Markup:
    sampler, trainer = _at(_numbers(trace, "sampler"), index), _at(_numbers(trace, "trainer"), index)
    sampled = trace.get("sampled")
    if isinstance(sampled, list) and index < len(sampled) and not sampled[index]:
        return element("span", _visible(text), class_="t given", title="from the environment")
    if sampler is None:
        return element("span", _visible(text), class_="t")
    probability = math.exp(sampler)
    tint = next((tint for tint, bound in enumerate(PROBABILITIES) if probability >= bound), len(PROBABILITIES))
    versions = trace.get("versions")
    version = f", weights {versions[index]}" if isinstance(versions, list) and index < len(versions) else ""
    title = f"{percent(probability)}, log-prob {number(sampler)}, trainer's {number(trainer)}{version}"
    return element("span", _visible(text), class_=f"t p{tint}", title=title)


def _diverging(kl: Sequence[float | None], index: int, text: str) -> Markup:
    value = _at(kl, index)
    if value is None:
        return element("span", _visible(text), class_="t given", title="nothing was learned here")
    tint = next((tint for tint, bound in enumerate(DIVERGENCES) if value < bound), len(DIVERGENCES))
    return element("span", _visible(text), class_=f"t k{tint}", title=f"{number(value)} nats")


def _facts(
    trace: Record, tokens: Sequence[str], sampler: Sequence[float | None], kl: Sequence[float | None]
) -> list[tuple[str, str]]:
    facts = []
    parts = trace.get("reward_parts")
    if isinstance(parts, dict) and parts:
        facts.append(("reward's parts", ", ".join(f"{name} {number(value)}" for name, value in parts.items())))
    if is_number(trace.get("advantage")):
        facts.append(("advantage", number(trace["advantage"])))
    group = trace.get("group_rewards")
    if isinstance(group, list):
        facts.append(("rewards of its group", ", ".join(number(value) for value in group)))
    known = [(value, index) for index, value in enumerate(sampler[: len(tokens)]) if value is not None]
    if known:
        lowest, index = min(known)
        mean = sum(value for value, _ in known) / len(known)
        facts.append(("mean log-prob", number(mean)))
        facts.append(("least likely token", f"{_visible(tokens[index])!r}, {percent(math.exp(lowest))}"))
    differing = [(value, index) for index, value in enumerate(kl[: len(tokens)]) if value is not None]
    if differing:
        highest, index = max(differing)
        facts.append(("largest divergence", f"{number(highest)} nats at {_visible(tokens[index])!r}"))
    facts.append(("ended by", str(trace.get("finish_reason", "–"))))
    return facts


def _visible(text: str) -> str:
    """Line ends and empty tokens can be seen."""
    return text.replace("\r", "␍").replace("\n", "↵\n").replace("\t", "⇥") or "∅"


def _numbers(trace: Record, key: str) -> list[float | None]:
    values: Any = trace.get(key)
    return [float(value) if is_number(value) else None for value in values] if isinstance(values, list) else []


def _at(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None
