"""A made-up run of the rollout log: requests, workers that write them, and the truth to compare with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rollouts.log import LogWriter, Recovered
from rollouts.types import NewTokens, SampleRequest, Sampling


def token_at(request: str, position: int) -> tuple[int, float]:
    """The one token and log-probability (a float32) that a request has at a position."""
    source = random.Random(f"{request}/{position}")
    return source.randrange(2**31), float(np.float32(-source.expovariate(1)))


def request_of(name: str, tokens: int = 0, attempt: int = 0) -> SampleRequest:
    """A request that has `tokens` tokens already."""
    source = random.Random(name)
    prompt = [source.randrange(129280) for _ in range(source.randrange(1, 9))]
    done = [token_at(name, position)[0] for position in range(tokens)]
    sampling = Sampling(max_tokens=100, temperature=0.7, seed=3, stop_token_ids=(1, 2))
    return SampleRequest(name, prompt, done, sampling, source.getrandbits(63), attempt)


def new_tokens(name: str, position: int, count: int, version: int, finish: str | None = None) -> NewTokens:
    """The next `count` tokens of a request."""
    tokens = [token_at(name, at) for at in range(position, position + count)]
    return NewTokens(
        name, position, [token for token, _ in tokens], [logprob for _, logprob in tokens], version, finish
    )


@dataclass
class MadeRun:
    """Writes steps of random requests; remembers how long every request is and which of them are finished."""

    seed: int
    lengths: dict[str, int] = field(default_factory=dict)
    versions: dict[str, list[int]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.version = 0

    def write(self, writer: LogWriter, steps: int, resume: Sequence[str] = ()) -> None:
        """`resume`: requests that go on here from where they are."""
        running = list(resume)
        for name in resume:
            writer.open(request_of(name, self.lengths[name], attempt=1))
        for _ in range(steps):
            while len(running) < 4 and self.random.random() < 0.5:
                name = f"r{self.seed}/{len(self.lengths)}#0"
                writer.open(request_of(name))
                self.lengths[name], self.versions[name] = 0, []
                running.append(name)
            if self.random.random() < 0.1:
                self.version += 1
                writer.weights(self.version, f"checksum {self.version}")
            step = [self._advance(name) for name in running]
            writer.append(step)
            running = [name for name in running if name not in self.finished]

    def _advance(self, name: str) -> NewTokens:
        count = 1 if self.random.random() < 0.9 else self.random.randrange(4)
        begin = self.lengths[name]
        self.lengths[name] += count
        self.versions[name] += [self.version] * count
        finish = self.random.choice(("stop", "length")) if self.random.random() < 0.1 else None
        if finish:
            self.finished.add(name)
        return new_tokens(name, begin, count, self.version, finish)

    @property
    def unfinished(self) -> list[str]:
        return [name for name in self.lengths if name not in self.finished]

    def check_prefix(self, recovered: Recovered) -> None:
        """Whatever was recovered is a prefix of the truth."""
        for name, got in recovered.requests.items():
            want = request_of(name)
            assert (got.prompt_ids, got.sampling, got.seed) == (want.prompt_ids, want.sampling, want.seed)
            assert len(got.token_ids) <= self.lengths[name]
            truth = [token_at(name, position) for position in range(len(got.token_ids))]
            assert list(zip(got.token_ids, got.logprobs, strict=True)) == truth
            assert got.versions == self.versions[name][: len(got.versions)]
            if got.finish_reason is not None:
                assert name in self.finished
                assert len(got.token_ids) == self.lengths[name]

    def check_whole(self, recovered: Recovered) -> None:
        """Everything was recovered."""
        self.check_prefix(recovered)
        assert {name: len(got.token_ids) for name, got in recovered.requests.items()} == self.lengths
        assert {name for name, got in recovered.requests.items() if got.finish_reason} == self.finished


def made_log(directory: Path, seed: int, steps: int = 60, segment_bytes: int = 2000) -> MadeRun:
    """Two workers; the second continues what the first one left, in small segments."""
    run = MadeRun(seed)
    with LogWriter(directory, "w0", 0, segment_bytes=segment_bytes) as writer:
        run.write(writer, steps)
    with LogWriter(directory, "w1", 4, segment_bytes=segment_bytes) as writer:
        run.write(writer, steps, resume=run.unfinished)
    return run
