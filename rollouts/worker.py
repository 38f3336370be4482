"""A rollout worker: one engine in one Ray actor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import BadInput, RunFailed
from rollouts.engine import Engine, EngineInfo
from rollouts.settings import EngineKind, EngineSettings
from rollouts.types import Completion, Sampling
from rollouts.weights import PackedTensor, WeightUpdate, combined_checksum, iterate_safetensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadReport:
    """A worker's word on the weights that stand in its engine."""

    version: int
    checksum: str
    """Over all tensors as they arrived (`combined_checksum`)."""
    tensors: int
    verified: int
    """Engine parameters compared with what arrived."""
    unverified: tuple[str, ...]
    """Engine parameters that nothing could be compared with."""
    seconds: float


@dataclass(frozen=True)
class WorkerStats:
    """Totals of one worker since its start."""

    completions: int
    tokens: int
    """Tokens sampled."""
    busy_seconds: float
    """Time spent in `generate`."""
    version: int | None
    rss_bytes: int


class RolloutWorker:
    """The methods of the actor. `start` builds the engine, not the constructor: so its errors arrive as they are."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._engine: Engine | None = None
        self._completions = 0
        self._tokens = 0
        self._busy_seconds = 0.0

    def start(self) -> EngineInfo:
        """Build the engine. It has no weights yet.

        Raises:
            BadInput: settings that the model cannot serve.
        """
        self._engine = Engine(self._settings)
        return self._engine.info

    def ping(self) -> bool:
        """True when the engine is there."""
        return self._engine is not None

    def publish(self, update: WeightUpdate) -> LoadReport:
        """Take a version of the weights out of Ray's object store into the engine.

        Raises:
            RunFailed: damaged on the way, or a version that does not grow: the engine keeps the weights it had.
                Incomplete, unknown names, or not what stands in the engine afterwards: the engine serves nothing
                until a good publication.
        """
        begin = time.monotonic()
        return self._load(update.checked_tensors(), update.version, update.checksums, begin)

    def load_checkpoint(self, path: str, version: int) -> LoadReport:
        """Read the weights of a checkpoint directory from disk into the engine; errors as `publish`, and BadInput."""
        begin = time.monotonic()
        tensors = _read_checkpoint(Path(path), self._settings.kind)
        checksums = {name: PackedTensor.of(tensor).checksum() for name, tensor in tensors.items()}
        return self._load(tensors, version, checksums, begin)

    def generate(self, prompts: list[list[int]], sampling: Sampling, first_index: int = 0) -> list[list[Completion]]:
        """See `Engine.generate`."""
        with self._timed():
            groups = self._running.generate(prompts, sampling, first_index)
        self._completions += sum(len(group) for group in groups)
        self._tokens += sum(len(completion.token_ids) for group in groups for completion in group)
        return groups

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See `Engine.score`."""
        return self._running.score(prompts, completions)

    def stats(self) -> WorkerStats:
        """Totals since the start, and the process's resident memory now."""
        import psutil

        version = self._engine.version if self._engine else None
        rss_bytes = psutil.Process().memory_info().rss
        return WorkerStats(self._completions, self._tokens, self._busy_seconds, version, rss_bytes)

    def _load(
        self, tensors: dict[str, torch.Tensor], version: int, checksums: dict[str, str], begin: float
    ) -> LoadReport:
        found = self._running.load_weights(tensors, version)
        return LoadReport(
            version=version,
            checksum=combined_checksum(checksums),
            tensors=len(tensors),
            verified=found.verified,
            unverified=tuple(found.unverified),
            seconds=time.monotonic() - begin,
        )

    @property
    def _running(self) -> Engine:
        if self._engine is None:
            raise RunFailed("the rollout worker has not been started")
        return self._engine

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._busy_seconds += time.monotonic() - begin


def _read_checkpoint(path: Path, kind: EngineKind) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under the names that the engine takes."""
    if kind == "vllm":
        return dict(iterate_safetensors(path))
    from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
    from posttrain.models.deepseek_v4.checkpoint import CheckpointError

    try:
        # Stacks the experts and renames: the engine's names are our model's, not those in the files.
        return DeepseekV4ForCausalLM.from_pretrained(str(path)).state_dict()
    except CheckpointError as error:
        raise BadInput(str(error)) from error
