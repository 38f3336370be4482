"""`python -m benchmarks.rollout_length_bias [--samples N]`: restarting samples makes answers short, the log does not.

A sample that is long is in flight for long, so it is more likely to meet its engine's death. Whoever then draws it
anew draws an answer of ordinary length in its place: what reaches training is shorter than what the model says. The
report of DeepSeek-V4 gives this as a reason for its token-granular log. Here engines are killed at random moments, and
the lengths are compared with those of an undisturbed run by the two-sample Kolmogorov-Smirnov test: once with samples
that go on from the log, once with samples that begin again. All three have random numbers of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from benchmarks.rollout_kit import make_groups, rollout_pool, write_checkpoint
from posttrain.files import atomic_write
from rollouts.pool import RolloutPool
from rollouts.types import GroupRequest

MODES = {"undisturbed": 1, "log": 2, "restart": 3}
"""Name → seed."""
WATCH_SECONDS = 0.1
LABELS = {"undisturbed": "undisturbed", "log": "kills, with the log", "restart": "kills, naive restart"}


def main() -> None:
    """Print the tests; write length_bias.json and length_bias.png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_length_bias", description=__doc__)
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--kill-tokens", type=int, default=6000, help="that an engine samples in its life, on average")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/length_bias"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    write_checkpoint(arguments.output)
    lengths: dict[str, list[int]] = {}
    kills: dict[str, int] = {}
    for mode in MODES:
        with rollout_pool(arguments.output, arguments.output / f"log-{mode}") as pool:
            lengths[mode], kills[mode] = Run(pool, mode, arguments.samples, arguments.kill_tokens).result()
        print(f"{mode}: {kills[mode]} kills, mean length {sum(lengths[mode]) / len(lengths[mode]):.2f}", flush=True)
    results = {
        "samples": arguments.samples,
        "kill_tokens": arguments.kill_tokens,
        "kills": kills,
        "mean_length": {mode: sum(values) / len(values) for mode, values in lengths.items()},
        "ks": {
            mode: dict(zip(("d", "p"), kolmogorov_smirnov(lengths["undisturbed"], lengths[mode]), strict=True))
            for mode in ("log", "restart")
        },
    }
    atomic_write(arguments.output / "length_bias.json", json.dumps(results | {"lengths": lengths}) + "\n")
    plot(lengths, results, arguments.output / "length_bias.png")
    print(json.dumps(results, indent=2))


class Run:
    """Samples of one mode."""

    def __init__(self, pool: RolloutPool, mode: str, samples: int, kill_tokens: int) -> None:
        self._pool = pool
        self._client = pool.client()
        self._mode = mode
        self._kill_tokens = kill_tokens
        self._groups = {group.id: group for group in make_groups(samples, 1, MODES[mode], mode)}
        self._draws = samples
        self._kills = 0
        self._over = threading.Event()
        self._chance = random.Random(MODES[mode])

    def result(self) -> tuple[list[int], int]:
        """Lengths of all samples, and how many engines were killed."""
        killer = threading.Thread(target=self._kill, daemon=True)
        self._client.submit(list(self._groups.values()))
        if self._mode != "undisturbed":
            killer.start()
        lengths: list[int] = []
        while len(lengths) < len(self._groups):
            for group in self._client.collect(1, timeout=1):
                if group.failure is not None:
                    raise RuntimeError(group.failure)
                lengths.append(len(group.completions[0].token_ids))
                self._client.acknowledge([group.request.id])
        self._over.set()
        if killer.ident is not None:
            killer.join()
        return lengths, self._kills

    def _kill(self) -> None:
        """A life ends at a random number of tokens rather than of seconds: how loaded the machine is, is no matter."""
        lives: dict[int, float] = {}
        while not self._over.wait(WATCH_SECONDS):
            for pid, tokens, samples in ray.get(self._pool._service.__ray_call__.remote(_in_flight)):
                lives.setdefault(pid, self._chance.expovariate(1 / self._kill_tokens))
                if tokens > lives[pid]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    lives[pid] = math.inf  # until the service knows
                    self._kills += 1
                    if self._mode == "restart":
                        self._draw_anew([sample.rpartition("#")[0] for sample in samples])

    def _draw_anew(self, ids: Sequence[str]) -> None:
        """What a service without a log does: forget what was sampled, and begin again."""
        self._client.cancel(ids)
        anew: list[GroupRequest] = []
        for group_id in ids:
            self._draws += 1
            original = self._groups[group_id.partition("+")[0]]
            anew.append(replace(original, id=f"{original.id}+{self._draws}", index=self._draws))
        self._client.submit(anew)


def _in_flight(service: Any) -> list[tuple[int, int, list[str]]]:
    """Process, tokens so far and samples of each worker; runs in the service."""
    slots = [slot for slot in service._fleet.slots.values() if slot.worker is not None and slot.beat is not None]
    return [(slot.worker.pid, slot.beat.tokens, service._scheduler.running(slot.index)) for slot in slots]


def kolmogorov_smirnov(one: Sequence[int], other: Sequence[int]) -> tuple[float, float]:
    """Two-sample statistic D, and p by the asymptotic distribution (conservative for integers, which have ties)."""

    def share(values: Sequence[int]) -> Callable[[int], float]:
        ordered = sorted(values)
        import bisect

        return lambda value: bisect.bisect_right(ordered, value) / len(ordered)

    first, second = share(one), share(other)
    d = max(abs(first(value) - second(value)) for value in {*one, *other})
    scaled = d * math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    if scaled < 0.2:
        return d, 1.0
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return d, min(1.0, max(0.0, p))


def plot(lengths: dict[str, list[int]], results: dict[str, Any], path: Path) -> None:
    """Cumulative distributions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for mode, values in lengths.items():
        test = results["ks"].get(mode)
        label = LABELS[mode] + (f" (D = {test['d']:.3f}, p = {test['p']:.2g})" if test else "")
        axes.step(sorted(values), [(at + 1) / len(values) for at in range(len(values))], label=label, where="post")
    axes.set(xlabel="tokens of an answer", ylabel="share of answers no longer", ylim=(0, 1), xlim=(0, None))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
