"""A program for test_ahead: one engine, with or without a step that is scheduled ahead; prints what it sampled.

`python -m tests.ahead_engine alone|ahead DIRECTORY`, in an engine's environment. vLLM schedules ahead on GPUs alone.
On a CPU its scheduler and runner do so too, if they are told to and streams and events, of which there are none, do
nothing; steps are then computed before they are asked for, and all that is different is when their tokens are known.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from rollouts.engine import Engine
from rollouts.settings import EngineSettings, write_description
from rollouts.types import NewTokens, SampleRequest, Sampling
from tests.v4_models import VOCABULARY, our_model


class Nothing:
    """A stream or an event."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def nothing(self, *_: object) -> None: ...

    record = wait = synchronize = wait_stream = nothing


def allow_ahead_on_cpus() -> None:
    """Undo what vLLM settles for CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def ahead(platform: Any, config: Any) -> None:
        settle(platform, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(ahead)  # type: ignore[assignment]
    cuda: Any = torch.cuda
    cuda.Event = cuda.Stream = cuda.current_stream = Nothing
    cuda.stream = lambda _: contextlib.nullcontext()


def start(directory: Path, ahead: bool) -> Engine:
    """An engine without weights."""
    our_model(0).save_pretrained(directory / "checkpoint")
    write_description(directory / "checkpoint", directory / "description", "native")
    if ahead and not torch.cuda.is_available():
        allow_ahead_on_cpus()
    engine = Engine(
        EngineSettings(
            description=str(directory / "description"),
            kind="native",
            dtype="float32",
            max_model_len=192,
            max_num_seqs=16,
            max_num_batched_tokens=64,
            kv_cache_bytes=32 << 20,
        )
    )
    if not ahead:
        engine._core.one_step_at_a_time()
    return engine


class Story:
    """An engine with samples, and all that it has given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.given: list[NewTokens] = []
        self.empty_steps = 0

    def publish(self, version: int) -> None:
        model = our_model(version)
        self.engine.load_weights({name: tensor.cpu() for name, tensor in model.engine_state_dict().items()}, version)

    def add(self, name: str, length: int, **sampling: Any) -> None:
        torch.manual_seed(length)
        prompt = torch.randint(2, VOCABULARY, (length,)).tolist()
        self.engine.add(SampleRequest(name, prompt, [], Sampling(**{"max_tokens": 24, **sampling}), seed=length))

    def step(self) -> None:
        new = self.engine.step()
        self.given += new
        self.empty_steps += not new

    def until(self, name: str, tokens: int) -> None:
        """So many tokens of a sample."""
        while sum(len(new.token_ids) for new in self.given if new.id == name) < tokens:
            self.step()

    def end(self) -> None:
        while self.engine.busy:
            self.step()

    def told(self) -> dict[str, Any]:
        """Everything, sample by sample."""
        told: dict[str, Any] = {}
        for new in self.given:
            of = (new.token_ids, new.logprobs, new.version, new.finish_reason, new.routes.hex(), new.mask.hex())
            told.setdefault(new.id, []).append((new.position, *of))
        return told


def tell(engine: Engine) -> dict[str, Any]:
    """New weights, scores, routes and masks among samples, some of which stop, are aborted, or come back."""
    story = Story(engine)
    story.publish(1)
    for length in (1, 5, 33, 70):
        story.add(f"plain {length}", length)
        story.add(f"stops {length}", length, stop_token_ids=tuple(range(2, 12)))
    story.until("plain 70", 6)
    story.publish(2)
    story.until("plain 5", 16)
    kept = engine.samples["plain 5"]
    engine.abort(["plain 5"])
    scores = engine.score([[3, 4, 5]], [[6, 7, 8, 9]])
    engine.add(kept)
    story.add("masked 9", 9, top_p=0.7, masks=True)
    story.until("plain 1", 20)
    story.add("routed 20", 20, routes=True)
    story.end()
    story.add("last 12", 12)
    story.end()
    engine.audit()
    return {"scores": scores, "samples": story.told(), "empty_steps": story.empty_steps}


if __name__ == "__main__":
    print(json.dumps(tell(start(Path(sys.argv[2]), ahead=sys.argv[1] == "ahead"))))
