"""`python -m benchmarks.rollout_log [--quick]`: what it costs that no sampled token is ever lost.

Bytes a token, the time to write, to sync and to recover, with made-up requests; then the tiny engine with and without
the log, turn by turn; last, what random numbers by a counter cost beside vLLM's generator for each request.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Spread, seconds, take_turns
from posttrain.files import atomic_write
from rollouts.log import LogWriter, recover
from rollouts.settings import engine_environment
from rollouts.types import NewTokens, SampleRequest, Sampling

if TYPE_CHECKING:
    from rollouts.engine import Engine

REQUESTS = 64
"""At a time."""
PROMPT = 16


def main() -> None:
    """Print a table, write log.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_log", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats: a check, not a measurement")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of log.json")
    arguments = parser.parse_args()
    os.environ.update(engine_environment(1))  # before torch and vLLM are imported
    quick = arguments.quick
    arguments.output.mkdir(parents=True, exist_ok=True)
    # Not in /tmp, which may be memory: an fsync has to reach the disk that a run would use.
    with tempfile.TemporaryDirectory(dir=arguments.output) as name:
        directory = Path(name)
        results = {
            "requests": REQUESTS,
            "alone": [alone(directory, length, 200 if quick else 5000) for length in (100, 1000, 10_000)],
            "sync": sync_seconds(directory, 20 if quick else 200),
            "engine": with_engine(directory, 2 if quick else 20),
            "drawing": [drawing(rows, vocabulary, 5) for rows in (64, 256) for vocabulary in (512, 129_280)],
        }
    atomic_write(arguments.output / "log.json", json.dumps(results, indent=2) + "\n")
    show(results)
    os._exit(0)  # vLLM's own clean-up at exit waits for processes that were never started


def alone(directory: Path, mean_length: int, steps: int) -> dict[str, Any]:
    """A full batch of requests with geometric lengths; whenever one ends, the next begins."""
    source, numbers = random.Random(0), itertools.count()
    place = directory / f"alone-{mean_length}"
    times = []
    with LogWriter(place, "worker", 0) as writer:
        running: dict[str, int] = {}
        opened = 0.0
        for _ in range(steps):
            while len(running) < REQUESTS:
                request = SampleRequest(
                    f"expert/letters/grpo/{next(numbers)}#0", [1] * PROMPT, [], Sampling(1 << 20), 7
                )
                opened += seconds(partial(writer.open, request))
                running[request.id] = 0
            step = [
                NewTokens(name, at, [at], [-0.5], 1, "stop" if source.random() < 1 / mean_length else None)
                for name, at in running.items()
            ]
            times.append(seconds(partial(writer.append, step)))
            running = {new.id: new.position + 1 for new in step if new.finish_reason is None}
    size, tokens = sum(path.stat().st_size for path in place.iterdir()), steps * REQUESTS
    recovery = seconds(lambda: recover(place))
    return {
        "mean_length": mean_length,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "append_seconds": Spread.of(times).as_dict(),
        "write_seconds_per_token": (opened + sum(times)) / tokens,
        "recovery_tokens_per_second": tokens / recovery,
    }


def sync_seconds(directory: Path, repeats: int) -> dict[str, Any]:
    """One fsync after each step of a full batch."""
    times = []
    with LogWriter(directory / "sync", "worker", 0, sync_seconds=1e6) as writer:
        names = [str(number) for number in range(REQUESTS)]
        for name in names:
            writer.open(SampleRequest(name, [1] * PROMPT, [], Sampling(1 << 20), 7))
        for at in range(repeats):
            writer.append([NewTokens(name, at, [at], [-0.5], 1) for name in names])
            times.append(seconds(writer.sync))
    return Spread.of(times).as_dict()


def with_engine(directory: Path, repeats: int) -> dict[str, Any]:
    """The tiny engine, sampling full batches with the log and without."""
    from benchmarks.models import v4_config
    from benchmarks.rollout import start_engine
    from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM

    engine, new = start_engine(1), 64
    engine.load_weights(dict(DeepseekV4ForCausalLM(v4_config()).engine_state_dict()), 1)
    numbers, in_log = itertools.count(), []
    with LogWriter(directory / "engine", "worker", 0) as writer:
        contestants = {
            "log": lambda: in_log.append(sample(engine, writer, next(numbers), new)),
            "none": lambda: sample(engine, None, next(numbers), new),
        }
        times = take_turns(contestants, repeats)
    shares = [logged / whole for logged, whole in zip(in_log[1:], times["log"], strict=True)]
    rates = {name: Spread.of([REQUESTS * new / one for one in found]).as_dict() for name, found in times.items()}
    ratios = [none / log for log, none in zip(times["log"], times["none"], strict=True)]
    return {
        "repeats": repeats,
        "new_tokens": new,
        "tokens_per_second": rates,
        "ratio": Spread.of(ratios).as_dict(),
        "share_of_time_in_log": Spread.of(shares).as_dict(),
    }


def sample(engine: Engine, writer: LogWriter | None, number: int, new: int) -> float:
    """One full batch, as a worker samples it. Returns the seconds spent in the log."""
    spent = 0.0
    for row in range(REQUESTS):
        prompt = [2 + (number + row * at) % 100 for at in range(PROMPT)]
        request = SampleRequest(f"{number}/{row}#0", prompt, [], Sampling(new), row)
        engine.add(request)
        if writer is not None:
            spent += seconds(partial(writer.open, request))
    while engine.busy:
        step: Sequence[NewTokens] = engine.step()
        if writer is not None:
            spent += seconds(partial(writer.append, step))
    if writer is not None:
        spent += seconds(writer.sync)
    return spent


def drawing(rows: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """One token for each row: by counter, and as vLLM does it, by a generator for each row."""
    import numpy as np
    import torch

    from rollouts.randomness import draw, position_keys

    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(rows, vocabulary, device=device)
    generators = [torch.Generator(device).manual_seed(row) for row in range(rows)]
    at = itertools.count()

    def by_counter() -> None:
        keys = position_keys(np.arange(rows), np.full(rows, next(at)))
        draw(logits, torch.from_numpy(keys).to(device)).tolist()

    def by_generator() -> None:
        noise = torch.empty_like(logits)
        for row, generator in enumerate(generators):
            noise[row].exponential_(generator=generator)
        logits.softmax(-1).div_(noise).argmax(-1).tolist()

    times = take_turns({"counter": by_counter, "generators": by_generator}, repeats)
    found = {name: Spread.of(found).as_dict() for name, found in times.items()}
    return {"rows": rows, "vocabulary": vocabulary, "device": device, "seconds": found}


def show(results: dict[str, Any]) -> None:
    """Medians, with ranges in brackets."""
    for row in results["alone"]:
        print(
            f"{REQUESTS} requests, {row['mean_length']:6} tokens each: {row['bytes_per_token']:.1f} bytes/token, "
            f"append {_spread(row['append_seconds'], 1e6)} µs/step, "
            f"{row['write_seconds_per_token'] * 1e6:.2f} µs/token in all, "
            f"recovery {row['recovery_tokens_per_second']:,.0f} tokens/s"
        )
    print(f"fsync: {_spread(results['sync'], 1e3)} ms")
    engine = results["engine"]
    rates, ratio, share = engine["tokens_per_second"], engine["ratio"], engine["share_of_time_in_log"]
    print(f"tiny engine, tokens/s: with log {_spread(rates['log'])}, without {_spread(rates['none'])}")
    print(f"  with / without {_spread(ratio, 1, 3)}; time spent in the log {_spread(share, 100, 2)} %")
    for row in results["drawing"]:
        times = row["seconds"]
        print(
            f"drawing {row['rows']} tokens of {row['vocabulary']:,} on {row['device']}: "
            f"counter {_spread(times['counter'], 1e3)} ms, generators {_spread(times['generators'], 1e3)} ms"
        )


def _spread(values: dict[str, float], unit: float = 1, digits: int = 1) -> str:
    median, lowest, highest = (f"{values[key] * unit:,.{digits}f}" for key in ("median", "lowest", "highest"))
    return f"{median} ({lowest} to {highest})"


if __name__ == "__main__":
    main()
