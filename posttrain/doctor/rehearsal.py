"""A rehearsal: three steps of every stage, with everything that the run will use; and what follows from it.

What a rehearsal shows is not guessed: sizes and actors are the recipe's, only the numbers of steps and of problems to
measure on are small. Step times and the peak of memory are those of the run; totals are multiples of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from posttrain.doctor.estimate import estimated_seconds
from posttrain.doctor.machine import standing
from posttrain.doctor.verdicts import Status, Verdict
from posttrain.observe.metrics import read_metrics
from posttrain.observe.words import duration, number, size
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data import Problem

STEPS = 3
MEASURED = 16
"""Problems of each domain that models of a rehearsal are measured on."""
SELF_DIVERGENCE = 1e-6
"""Nats by which a model may differ from itself."""
LOGPROB_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Nats between trainer and sampler, on a single token, above which something is wrong."""


def shortened(recipe: Recipe) -> Recipe:
    """The recipe with `STEPS` steps of each stage, small measurements, and gates that only warn."""
    document = recipe.model_dump(mode="json")
    stages = document["stages"]
    experts = stages["experts"]
    lists = [experts["per_domain"], *experts["overrides"].values()]
    warm_start = (stages["student"] or {}).get("warm_start")
    for stage in (stages["base"], stages["student"], warm_start, *chain.from_iterable(lists)):
        if stage is not None:
            stage["steps"] = min(stage["steps"], STEPS)
    experts["gate"]["action"] = "warn"
    for domain in document["domains"].values():
        domain["selection"] = min(domain["selection"], MEASURED)
    for hook in document["evaluation"]:
        if hook["holdout"] is not None:
            hook["holdout"]["n"] = min(hook["holdout"]["n"], MEASURED)
        if hook["judge"] is not None:
            hook["judge"]["n"] = min(hook["judge"]["n"], MEASURED)
        if hook["lm_eval"] is not None:
            hook["lm_eval"]["limit"] = min(hook["lm_eval"]["limit"] or MEASURED, MEASURED)
    document["cluster"]["dashboard"] = False
    document["trackers"] = []
    return Recipe.model_validate(document)


def rehearse(recipe: Recipe, scratch: Path, runs: Path) -> Iterator[Verdict]:
    """Run the shortened recipe in `scratch`, and judge what it wrote."""
    from posttrain.pipeline import drive
    from posttrain.session import session

    told = io.StringIO()
    with RunDirectory.create(scratch, "rehearsal", shortened(recipe)) as run:
        with contextlib.redirect_stdout(told), session(run.recipe, run) as (work, initial):
            drive(work, initial)
        problems = [problem for data in work.domains.values() for problem in data.holdout[:MEASURED]]
        report = json.loads((run.path / "report.json").read_text())
        records = list(read_metrics(run.path / "metrics.jsonl"))
        done = [stage["name"] for stage in report["stages"] if stage["status"] == "finished"]
        yield Verdict("rehearsal", "ok", f"{STEPS} steps of {', '.join(done)} in {duration(report['wall_seconds'])}")
        yield _losses(records)
        yield _log_probabilities(recipe, report)
        yield Verdict(
            "weights in engines",
            "ok",
            f"{report['rollout']['weight_syncs']} updates, each compared with what was sent, tensor by tensor",
        )
        yield _itself(recipe, work.tokenizer, problems, initial)
        yield _memory(recipe, report)
        yield _disk(recipe, run, runs)
        yield Verdict("time", "ok", f"about {duration(estimated_seconds(recipe, report, records))} for the whole run")


def _losses(records: list[dict[str, Any]]) -> Verdict:
    steps = [record for record in records if "metrics" in record]
    for record in steps:
        for name, value in record["metrics"].items():
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                where = f"{name} of {record['stage']} is {value} at step {record['step']}"
                return Verdict("losses", "failed", where, "lower the stage's optimizer.lr; look at its data")
    return Verdict("losses", "ok", f"finite in all of {len(steps)} steps")


def _log_probabilities(recipe: Recipe, report: dict[str, Any]) -> Verdict:
    largest = report["rollout"]["max_abs_logprob_diff"]
    if largest is None:
        return Verdict("trainer = sampler", "skipped", "no stage of this recipe samples")
    bound = LOGPROB_DIFFERENCE[recipe.rollout.dtype]
    found = f"log-probabilities of sampled tokens differ by {number(largest)} nats at most"
    if largest <= bound:
        return Verdict("trainer = sampler", "ok", found)
    remedy = "the sampler serves another model than the one that is trained: compare precision and kernels of both"
    return Verdict("trainer = sampler", "failed", f"{found}; {bound} is allowed for {recipe.rollout.dtype}", remedy)


def _itself(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], initial: Path) -> Verdict:
    """A student that is its own teacher has nothing to learn: the loss and its two sides agree on what a model says."""
    import torch

    from distill.divergence import reverse_kl
    from distill.prefill import states_of
    from posttrain.data.rows import sft_rows
    from posttrain.trainers.models import load_model

    model = load_model(recipe.model.family, initial).eval()
    sequences = [row["input_ids"] for row in sft_rows(tokenizer, problems)]
    kept = [len(sequence) - 1 for sequence in sequences]
    states = [torch.cat(states_of(model, sequences, kept, "cpu")) for _ in range(2)]
    head = model.get_output_embeddings().weight.detach()
    largest = reverse_kl(states[0], head, states[1], head).abs().max().item()
    status: Status = "ok" if largest <= SELF_DIVERGENCE else "failed"
    return Verdict("student = teacher", status, f"a model is {number(largest)} nats from itself, on {sum(kept)} tokens")


def _memory(recipe: Recipe, report: dict[str, Any]) -> Verdict:
    peak, there = report["resources"]["peak_rss_bytes"], psutil.virtual_memory().total
    found = f"{size(peak)} at the peak, {size(there)} in the machine"
    remedy = "fewer trainers or rollout_workers, a smaller batch_size, or a smaller kv_cache_mib"
    if recipe.cluster.address is not None or peak <= 0.8 * there:
        return Verdict("memory", "ok", found)
    return Verdict("memory", "failed" if peak > there else "warning", found, remedy)


def _disk(recipe: Recipe, run: RunDirectory, runs: Path) -> Verdict:
    """Every stage leaves one checkpoint; the log of samples forgets what was learned from."""
    checkpoints = sum(file.stat().st_size for file in (run.path / "checkpoints").rglob("*") if file.is_file())
    free = shutil.disk_usage(standing(runs)).free
    found = f"{size(checkpoints)} of checkpoints, {size(free)} free"
    status: Status = "ok" if checkpoints <= 0.8 * free else "failed"
    return Verdict("disk", status, found, "" if status == "ok" else "free space, or name another --runs-dir")
