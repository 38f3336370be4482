"""Run directories as a real run leaves them, without the run: for the tests of live view, status and report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.observe.intervals import binomial_interval
from posttrain.observe.metrics import MetricsLog
from posttrain.recipe import Recipe, resolved_yaml

START = 1_700_000_000.0
ENVIRONMENT = {
    "python": "3.11.9",
    "system": "Linux 6.8.0 x86_64",
    "processor": "Some Processor",
    "cores": 2,
    "memory_bytes": 25 * 2**30,
    "commit": "0123456789abcdef",
    "packages": {"torch": "2.13.0", "ray": "2.60.0"},
}
ACCURACY = {"base": 0.22, "sft": 0.58, "grpo": 0.86, "student": 0.85}
SECONDS = {"base": 95.0, "sft": 48.0, "grpo": 190.0, "student": 210.0}
TOKENS = 240_000
"""Tokens that every stage trained on."""

Record = dict[str, Any]


def recipe(domains: tuple[str, ...] = ("arithmetic", "letters"), **stages: Any) -> Recipe:
    """A recipe of base, SFT and GRPO in each domain, and a student; `stages` replaces some of them."""
    chain = [{"kind": "sft", "steps": 60}, {"kind": "grpo", "steps": 100}]
    student = {"kind": "opd", "steps": 150}
    stages = {"base": {"kind": "sft", "steps": 120}, "experts": {"per_domain": chain}, "student": student, **stages}
    source = {"source": {"reasoning_gym": "chain_sum"}}
    fields = {"domains": dict.fromkeys(domains, source), "stages": stages, "model": {"config": "tiny"}}
    return Recipe.model_validate({"name": "tiny-v4", "seed": 7, **fields})


def finished_run(domains: tuple[str, ...] = ("arithmetic", "letters"), seed: int = 0) -> list[Record]:
    """All records of a run that went well; the experts run side by side. Sorted by time."""
    generator = random.Random(seed)
    base_end = START + 5 + SECONDS["base"]
    grpo_end = base_end + SECONDS["sft"] + SECONDS["grpo"] + 10 + len(domains)
    end = grpo_end + SECONDS["student"] + 40
    records = [{"time": START, "event": "run_started", "environment": ENVIRONMENT}]
    records += _stage(generator, "base", 120, START + 5, domains)
    for index, domain in enumerate(domains):
        start = base_end + 2 + index
        records += _stage(generator, f"expert/{domain}/sft", 60, start, domains)
        records += _stage(generator, f"expert/{domain}/grpo", 100, start + SECONDS["sft"] + 4, domains)
        gain = {"parent": ACCURACY["base"], "value": ACCURACY["grpo"], "gain": 0.64, "min_gain": 0.1, "passed": True}
        gate = {"event": "gate", "stage": f"expert/{domain}/grpo", "domain": domain, "action": "warn", **gain}
        records.append({"time": grpo_end - 2, **gate})
    records += _stage(generator, "student", 150, grpo_end + 1, domains)
    queues = random.Random(2)
    for second in range(0, int(end - START), 15):
        records.append({"time": START + second, "event": "resources", **_memory(second)})
        records.append({"time": START + second, "event": "queues", **_queues(queues)})
    for record in [*_evaluations(generator, domains), *_samples(domains)]:
        records.append({"time": end - 20, **record})
    records.append({"time": end, "event": "run_finished", "status": "finished"})
    return sorted(records, key=lambda record: record["time"])


def write_run(
    directory: Path, records: list[Record], of: Recipe | None = None, traced: list[Record] | None = None
) -> Path:
    """Make `directory` a run directory of that recipe with these records."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(resolved_yaml(of or recipe()))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if traced:
        (directory / "traces.jsonl").write_text("".join(json.dumps(record) + "\n" for record in traced))
    return directory


def write_many(log: MetricsLog, writer: int) -> None:
    """Write 200 steps; run by processes of their own."""
    for step in range(200):
        log.write(f"stage-{writer}", step, 200, {"loss": 0.0, "text": "x" * 3000})


def _stage(generator: random.Random, name: str, steps: int, start: float, domains: tuple[str, ...]) -> Iterator[Record]:
    kind = name.rpartition("/")[2]
    seconds = SECONDS[kind]
    yield {"time": start, "event": "stage_started", "stage": name, "steps": steps}
    for step in range(1, steps + 1):
        metrics = _metrics(generator, kind, step / steps, domains)
        metrics |= {"seconds_step": seconds / steps, "tokens_per_second": TOKENS / seconds}
        if kind in ("grpo", "student"):
            metrics["seconds_generate"] = 0.6 * seconds / steps
        yield {"time": start + seconds * step / steps, "stage": name, "step": step, "steps": steps, "metrics": metrics}
    if kind in ("grpo", "student"):
        facts = {"max_abs_logprob_diff": 3.1e-6, "k3": 4.2e-9}
        syncs = [0.11 + 0.01 * index for index in range(5)]
        yield {"time": start + seconds, "event": "rollout_stats", "stage": name, **facts, "weight_sync_seconds": syncs}
    checkpoint = f"runs/tiny-v4/checkpoints/{name.replace('/', '--')}"
    ended = {"event": "stage_finished", "stage": name, "seconds": seconds, "steps": steps, "checkpoint": checkpoint}
    yield {"time": start + seconds, **ended}


def _metrics(generator: random.Random, kind: str, done: float, domains: tuple[str, ...]) -> dict[str, float]:
    def noisy(value: float, spread: float = 0.05) -> float:
        return max(0.0, value * (1 + generator.gauss(0, spread)))

    if kind in ("base", "sft"):
        return {"loss": noisy(0.3 + (3.2 if kind == "base" else 0.9) * math.exp(-5 * done)), "learning_rate": 1e-3}
    shared = {
        "entropy": noisy(0.25 + 0.6 * math.exp(-3 * done)),
        "completion_length": noisy(9 + 3 * done),
        "logprob_diff_max": noisy(2.2e-6, 0.3),
    }
    if kind == "grpo":
        reward = min(1.0, noisy(0.55 + 0.33 * (1 - math.exp(-4 * done)), 0.08))
        return {"loss": generator.gauss(0, 0.01), "reward": reward, "kl": noisy(0.02 * done, 0.2), **shared}
    by_domain = {
        f"kl/{domain}": noisy((0.9 + 0.3 * i) * math.exp(-4 * done) + 0.02) for i, domain in enumerate(domains)
    }
    mean = sum(by_domain.values()) / len(by_domain)
    return {
        "loss": mean,
        "kl": mean,
        **by_domain,
        "reward": min(1.0, noisy(0.85 - 0.6 * math.exp(-5 * done))),
        **shared,
    }


def _memory(second: int) -> dict[str, Any]:
    total = 2**30 * (2.2 + 2.4 * min(1.0, second / 240))
    kinds = {"actor Trainer": 0.5, "actor RolloutWorker": 0.3, "Ray": 0.1, "driver": 0.1}
    return {
        "rss_bytes": int(total),
        "pss_bytes": int(0.7 * total),
        "peak_rss_bytes": int(total),
        "peak_pss_bytes": int(0.7 * total),
        "peak_by_process_kind": {kind: int(share * total) for kind, share in kinds.items()},
        "cpu_seconds": 1.8 * second,
        "cpu_seconds_by_process_kind": {kind: 1.8 * share * second for kind, share in kinds.items()},
    }


def _queues(generator: random.Random) -> dict[str, Any]:
    most = {"waiting": 90, "running": 129, "ready_groups": 9}
    counts = {name: generator.randrange(limit) for name, limit in most.items()}
    return {**counts, "workers": 2, "deaths": 0, "tokens_per_second": 1830.0, "generators_idle": generator.random()}


def traces(domains: tuple[str, ...] = ("arithmetic", "letters")) -> list[Record]:
    """What the stages of `finished_run` write into traces.jsonl."""
    generator = random.Random(1)
    found = []
    for stage, steps in [*((f"expert/{domain}/grpo", 100) for domain in domains), ("student", 150)]:
        for step in (1, steps // 2, steps):
            own = (stage.split("/")[1],) * 2 if "/" in stage else domains
            found += [_trace(generator, stage, step, domain, sample) for sample, domain in enumerate(own)]
    return found


def _trace(generator: random.Random, stage: str, step: int, domain: str, sample: int) -> Record:
    tokens = ["4", "2", " ", "+", "\n", "<|tool|>", "word", " another", " \u00e9l\u00e9ment", "</s>"] * 4
    logprobs = [-abs(generator.gauss(0, 1.5)) for _ in tokens]
    group = {"advantage": 0.9 - 1.8 * sample, "group_rewards": [1.0, 0.0, 1.0, 0.25], "kl_to": "the reference"}
    return {
        "time": START + 300,
        "event": "trace",
        "stage": stage,
        "step": step,
        "domain": domain,
        "problem_id": "p1",
        "prompt": f"{domain}: 25 + 17 = ?",
        "reward": float(1 - sample),
        "reward_parts": {"exact": float(1 - sample), "length": -0.125},
        "finish_reason": "stop",
        "length": 60,
        "tokens": tokens,
        "sampled": [int(token != "<|tool|>") for token in tokens],
        "sampler": logprobs,
        "trainer": logprobs,
        "kl": [abs(generator.gauss(0, 1)) ** 3 if token != "<|tool|>" else None for token in tokens],
        "versions": [step] * len(tokens),
        **({"kl_to": domain, "measure": "reverse_kl"} if stage == "student" else group),
    }


def _evaluations(generator: random.Random, domains: tuple[str, ...]) -> Iterator[Record]:
    models = ["base", *(f"expert/{domain}/{kind}" for domain in domains for kind in ("sft", "grpo")), "student"]
    for model in models:
        parts = model.split("/")
        for domain in domains:
            foreign = parts[0] == "expert" and parts[1] != domain
            correct = round(
                256 * (ACCURACY["base"] if foreign else ACCURACY[parts[-1]] + generator.uniform(-0.02, 0.02))
            )
            result = {"domain": domain, "pass@1": correct / 256, "n": 256, "samples": 1, "mean_length": 9.5}
            interval = list(binomial_interval(correct, 256))
            yield {
                "event": "evaluated",
                "stage": model,
                "model": model,
                "checkpoint": f"checkpoints/{model}",
                **result,
                "ci95": interval,
            }


def _samples(domains: tuple[str, ...]) -> Iterator[Record]:
    for domain in domains:
        for first in range(4):
            for model, right in (("base", first == 3), (f"expert/{domain}/grpo", True), ("student", first != 2)):
                answer = str(first + 17) if right else "11"
                question = {"domain": domain, "prompt": f"{domain}: {first} + 17 = ?", "reference": str(first + 17)}
                yield {"event": "sample", "model": model, **question, "completion": answer, "correct": right}
