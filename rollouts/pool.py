"""The rollout workers of a run, seen from the driver (`RolloutPool`) and from the trainers (`RolloutClient`)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from posttrain.actors import describe_death
from posttrain.errors import BadInput, RunFailed
from rollouts.engine import EngineInfo
from rollouts.settings import EngineSettings, check_prompts, engine_environment
from rollouts.types import Completion, Sampling
from rollouts.weights import WeightUpdate, combined_checksum
from rollouts.worker import LoadReport, RolloutWorker, WorkerStats

if TYPE_CHECKING:
    import numpy as np
    import torch
    from ray.actor import ActorHandle

WORKER_CPUS = 0.01
"""What a worker claims of Ray's CPUs: its threads are `cluster.threads`, and on a small machine all actors share."""


class RolloutPool:
    """Starts the rollout workers and stops them again. Ray must be initialised.

    The engines come up in parallel and without weights: publish or load a checkpoint before generating.
    Can be used as a context manager.

    Args:
        settings: The same for every worker.
        workers: How many.
        gpus_per_worker: Ray GPUs that each of them claims.

    Raises:
        BadInput: settings that the model cannot serve.
        RunFailed: a worker died while starting.
    """

    def __init__(self, settings: EngineSettings, workers: int, gpus_per_worker: float = 0) -> None:
        begin = time.monotonic()
        actor = ray.remote(RolloutWorker).options(
            num_cpus=WORKER_CPUS,
            num_gpus=gpus_per_worker,
            max_restarts=0,
            runtime_env={"env_vars": engine_environment(settings.threads, settings.kernels)},
        )
        self._workers: list[ActorHandle] = [actor.remote(settings) for _ in range(workers)]
        try:
            infos: list[EngineInfo] = _get([worker.start.remote() for worker in self._workers])
        except BaseException:
            self.stop()
            raise
        self._info = infos[0]
        self.start_seconds = time.monotonic() - begin

    def client(self, worker_indices: Sequence[int] | None = None) -> RolloutClient:
        """A client of some of the workers; default: of all."""
        indices = range(len(self._workers)) if worker_indices is None else worker_indices
        return RolloutClient([self._workers[index] for index in indices], self._info)

    def stop(self) -> None:
        """End exactly the workers that this pool started."""
        while self._workers:
            ray.kill(self._workers.pop(), no_restart=True)

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


class RolloutClient:
    """Generation as a service. Picklable: made by the driver, used inside trainer actors."""

    def __init__(self, workers: list[ActorHandle], info: EngineInfo) -> None:
        self._workers = workers
        self._info = info

    def publish(self, weights: Mapping[str, np.ndarray | torch.Tensor], version: int) -> float:
        """Give all workers a new version of the weights; when it returns, every engine serves and has verified it.

        Args:
            weights: Complete, by name: the model's state dict. They are copied once, into Ray's object store, so the
                caller may go on changing its tensors.
            version: Higher than all before on these workers (see `weight_version`).

        Returns:
            Seconds it took.

        Raises:
            RunFailed: an engine does not hold what was sent; the message names the tensors.
        """
        begin = time.monotonic()
        update = WeightUpdate.pack(weights, version)
        shared = ray.put(update)
        reports = _get([worker.publish.remote(shared) for worker in self._workers])
        _require_agreement(reports, version, combined_checksum(update.checksums))
        return time.monotonic() - begin

    def load_checkpoint(self, path: str | Path, version: int) -> float:
        """Have all workers load a checkpoint directory (each reads it itself); returns seconds.

        Raises:
            BadInput: no checkpoint there.
            RunFailed: as `publish`.
        """
        begin = time.monotonic()
        reports = _get([worker.load_checkpoint.remote(str(path), version) for worker in self._workers])
        _require_agreement(reports, version, reports[0].checksum)
        return time.monotonic() - begin

    def weight_version(self) -> int | None:
        """The highest version on the workers; None before the first."""
        versions = [stats.version for stats in self.stats() if stats.version is not None]
        return max(versions, default=None)

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt, on all workers at once.

        What is sampled does not depend on the number of workers. The same prompts with the same `sampling` give the
        same completions: change `sampling.seed` from step to step.

        Raises:
            BadInput: a prompt that cannot be served (the message names its row); nothing was generated then.
        """
        check_prompts(prompts, sampling.max_tokens, self._info.max_model_len, self._info.vocab_size)
        costs = [len(prompt) + sampling.n * sampling.max_tokens for prompt in prompts]
        calls = [
            worker.generate.remote(prompts[begin:end], sampling, begin)
            for worker, (begin, end) in zip(self._workers, split_evenly(costs, len(self._workers)), strict=True)
            if end > begin
        ]
        return _joined(_get(calls))

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """Log-probability of each token of one completion per prompt, from prefill, at temperature 1.

        Raises:
            BadInput: a row that cannot be served.
        """
        costs = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        calls = [
            worker.score.remote(prompts[begin:end], completions[begin:end])
            for worker, (begin, end) in zip(self._workers, split_evenly(costs, len(self._workers)), strict=True)
            if end > begin
        ]
        return _joined(_get(calls))

    def stats(self) -> list[WorkerStats]:
        """One entry for each worker."""
        return _get([worker.stats.remote() for worker in self._workers])


def split_evenly(costs: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Cut rows into `parts` contiguous ranges (begin, end) of about the same cost; some may be empty."""
    total, spent, row, ranges = sum(costs), 0, 0, []
    for part in range(1, parts + 1):
        begin = row
        # A row belongs to the part in which its middle lies.
        while row < len(costs) and (part == parts or (spent + costs[row] / 2) * parts < total * part):
            spent += costs[row]
            row += 1
        ranges.append((begin, row))
    return ranges


def _joined(parts: Iterable[list[Any]]) -> list[Any]:
    return [row for part in parts for row in part]


def _require_agreement(reports: list[LoadReport], version: int, checksum: str) -> None:
    for index, report in enumerate(reports):
        if report.version != version or report.checksum != checksum:
            raise RunFailed(
                f"rollout worker {index} reports weights of version {report.version} with checksum {report.checksum}; "
                f"version {version} with checksum {checksum} was sent"
            )


def _get(references: list[Any]) -> list[Any]:
    """`ray.get`, with the project's own errors as they were raised instead of inside Ray's.

    Waits for every worker even when one fails, so that none is left in the middle of its work.
    """
    results, first_error = [], None
    for reference in references:
        try:
            results.append(ray.get(reference))
        except RayTaskError as error:
            own = isinstance(error.cause, BadInput | RunFailed)
            first_error = first_error or (error.cause if own else RunFailed(f"a rollout worker failed: {error}"))
        except RayActorError as error:
            first_error = first_error or RunFailed(describe_death(error))
    if first_error is not None:
        raise first_error
    return results
