"""The rollout service as trainers and the driver see it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from posttrain.actors import describe_death
from posttrain.errors import BadInput, RunFailed
from rollouts.asking import answers_to
from rollouts.fleet import own_error
from rollouts.scheduler import Lane
from rollouts.service import EarlyStop, ServiceStats
from rollouts.settings import EngineInfo, check_prompts, request_problem
from rollouts.types import UNNAMED, Completion, FinishedGroup, GroupRequest, Sampling
from rollouts.weights import WeightUpdate
from rollouts.worker import WorkerStats

if TYPE_CHECKING:
    import numpy as np
    import torch
    from ray.actor import ActorHandle

COLLECT_SECONDS = 5.0
"""How long one call to the service waits for finished groups."""
RESTART_SECONDS = 120.0
"""How long a service that died may take to answer again."""
SUBMITTED_GROUPS = 64
"""In one call to the service."""
UPDATES = 4
"""Partial updates that are kept beside a complete one, to be published again should the service die."""


class RolloutClient:
    """Generation as a service. Picklable: made by the driver, used inside trainer actors.

    Every unpickled copy is a client of its own: it collects what it submitted itself. Several threads may use one.

    Attributes:
        info: What the engines can take.
    """

    def __init__(self, service: ActorHandle, lane: Lane, info: EngineInfo) -> None:
        self._service = service
        self._lane = lane
        self.info = info
        self._begin()

    def _begin(self) -> None:
        self._session = uuid.uuid4().hex
        self._epoch: str | None = None
        self._lock = threading.RLock()
        self._outstanding: dict[str, _Outstanding] = {}
        """To be collected."""
        self._cancelled: set[str] = set()
        """Those that were cancelled while they were being submitted."""
        self._version = -1
        """The latest that this client published."""
        self._publications: list[tuple[str, list[Any]]] = []
        """What brings engines to the weights that this client published last: method of the service, arguments."""

    def __getstate__(self) -> dict[str, Any]:
        return {"_service": self._service, "_lane": self._lane, "info": self.info}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def submit(self, groups: Sequence[GroupRequest], early_stop: EarlyStop | None = None) -> None:
        """Ask for groups, to be collected as they finish. Waits while the service's queue is full.

        Groups whose ids the log knows go on from there; those that it has finished are not sampled again.

        Args:
            early_stop: When to end a group before all its samples are there.

        Raises:
            BadInput: a group that cannot be served, or an id that is there twice; nothing was queued then. The
                message names the row.
            RunFailed: no weights yet, or the service has failed.
        """
        rejected = self.check(groups)
        if rejected:
            raise BadInput(next(iter(rejected.values())))
        with self._lock:
            self._outstanding |= {group.id: _Outstanding(group, early_stop) for group in groups}
            self._cancelled -= {group.id for group in groups}
        try:
            for begin in range(0, len(groups), SUBMITTED_GROUPS):
                self._submit(groups[begin : begin + SUBMITTED_GROUPS], early_stop)
        except BaseException:
            with suppress(Exception):  # some may be in the queue
                self.cancel([group.id for group in groups])
            raise

    def submit_valid(self, groups: Sequence[GroupRequest], early_stop: EarlyStop | None = None) -> dict[int, str]:
        """As `submit`, but groups that cannot be served are left out.

        Returns:
            What is wrong with those, by their rows.
        """
        rejected = self.check(groups)
        self.submit([group for row, group in enumerate(groups) if row not in rejected], early_stop)
        return rejected

    def check(self, groups: Sequence[GroupRequest]) -> dict[int, str]:
        """What is wrong with groups that could not be served, by their rows."""
        rejected: dict[int, str] = {}
        rows: dict[str, int] = {}
        for row, group in enumerate(groups):
            first = rows.setdefault(group.id, row)
            problem = request_problem(group.prompt_ids, group.sampling, self.info)
            if problem is not None:
                rejected[row] = f"prompt {row} {problem} (request {group.id})"
            elif first != row or group.id in self._outstanding:
                rejected[row] = f"prompt {row} has the id {group.id!r}, which is there already; ids must be unique"
            elif not group.id or "#" in group.id:
                rejected[row] = f"prompt {row} has the id {group.id!r}; ids are not empty and have no '#'"
        return rejected

    def collect(
        self, count: int, ids: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[FinishedGroup]:
        """Take finished groups; each is handed out once.

        Args:
            count: How many. With `ids`: as many as those.
            ids: Take exactly these, in this order; default: as they finish.
            timeout: Seconds after which what is there is returned.

        Raises:
            RunFailed: an id that was not submitted or was collected before, or the service has failed.
        """
        if ids is not None:
            if strange := [group_id for group_id in ids if group_id not in self._outstanding]:
                raise RunFailed(f"group {strange[0]!r} is not waited for: it was not submitted, or was collected")
            count = len(ids)
        end = None if timeout is None else time.monotonic() + timeout
        taken: dict[str, FinishedGroup] = {}
        while len(taken) < count:
            seconds = COLLECT_SECONDS if end is None else min(COLLECT_SECONDS, end - time.monotonic())
            left = None if ids is None else [group_id for group_id in ids if group_id not in taken]
            for group in self._call("collect", self._session, count - len(taken), left, max(0.0, seconds)):
                with self._lock:
                    # Not there: it was handed out before the service died, and once more since.
                    if self._outstanding.pop(group.request.id, None) is not None:
                        taken[group.request.id] = group
            if end is not None and time.monotonic() >= end:
                break
        return list(taken.values()) if ids is None else [taken[group_id] for group_id in ids if group_id in taken]

    def consume(self, ids: Sequence[str]) -> None:
        """These groups were learned from. Until `forget_under` the log keeps them for the next driver, should this one
        die: it will be given the same answers."""
        self._call("consume", list(ids))

    def acknowledge(self, ids: Sequence[str]) -> None:
        """These groups were consumed for good: the log may forget them."""
        self.cancel(ids)

    def forget_under(self, prefix: str) -> None:
        """`acknowledge` of all groups of the run whose ids begin so; none of them must be waited for by now."""
        self._call("forget_under", prefix)

    def cancel(self, ids: Sequence[str]) -> None:
        """Nobody wants these groups: they are not sampled any further, not collected, and the log may forget them."""
        with self._lock:
            for group_id in ids:
                one = self._outstanding.pop(group_id, None)
                if one is not None and not one.queued:
                    self._cancelled.add(group_id)
        self._call("forget", list(ids))

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt, on all workers at once.

        What is sampled does not depend on the number of workers. The same prompts with the same `sampling` give the
        same completions: change `sampling.seed` from step to step.

        Raises:
            BadInput: a prompt that cannot be served (the message names its row); nothing was generated then.
            RunFailed: no weights, or a prompt that ends every engine it comes to.
        """
        check_prompts(prompts, sampling.max_tokens, self.info.max_model_len, self.info.vocab_size)
        name = f"{UNNAMED}{uuid.uuid4().hex}"
        groups = [GroupRequest(f"{name}/{row}", prompt, sampling, row) for row, prompt in enumerate(prompts)]
        return answers_to(self, groups, lambda request: f"prompt {request.index}")

    def publish(self, weights: Mapping[str, np.ndarray | torch.Tensor], version: int) -> float:
        """Give all workers a new version of the weights; when it returns, every engine serves and has verified it.

        Samples in progress go on under the new version.

        Args:
            weights: Complete, by name: the model's state dict. What changed is copied into Ray's object store, so the
                caller may go on changing its tensors.
            version: Higher than all before on these workers (see `weight_version`).

        Returns:
            Seconds it took.

        Raises:
            RunFailed: an engine does not hold what was sent; the message names the tensors.
        """
        begin = time.monotonic()
        whole = len(self._publications) >= UPDATES or any(method != "publish" for method, _ in self._publications)
        known = {} if whole or not self._publications else self._call("known_checksums", self._lane)
        update = WeightUpdate.pack(weights, version, known)
        arguments = [[ray.put(update)]]

        def published(_: Any) -> None:
            self._publications = [*(self._publications if update.unchanged else []), ("publish", arguments)]
            self._version = version

        self._repeat("publish", lambda: (self._lane, *arguments), published)
        return time.monotonic() - begin

    def load_checkpoint(self, path: str | Path, version: int) -> float:
        """Have all workers load a checkpoint directory (each reads it itself); returns seconds.

        Raises:
            BadInput: no checkpoint there.
            RunFailed: as `publish`.
        """
        begin = time.monotonic()
        arguments = [str(Path(path).resolve()), version]

        def loaded(_: Any) -> None:
            self._publications, self._version = [("load_checkpoint", arguments)], version

        self._repeat("load_checkpoint", lambda: (self._lane, *arguments), loaded)
        return time.monotonic() - begin

    def weight_version(self) -> int | None:
        """The newest version on these workers; None before the first."""
        return self._call("weight_version", self._lane)

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """Log-probability of each token of one completion per prompt, from prefill, at temperature 1.

        Raises:
            BadInput: a row that cannot be served.
        """
        return self._call("score", self._lane, prompts, completions)

    def stats(self) -> list[WorkerStats]:
        """One entry for each worker."""
        return self._call("stats", self._lane)

    def resize(self, workers: int) -> None:
        """Have so many workers in the service; those that go leave their samples to the others."""
        self._call("resize", workers)

    def service_stats(self) -> ServiceStats:
        """Of the service as a whole."""
        return self._call("service_stats")

    def _submit(self, groups: Sequence[GroupRequest], early_stop: EarlyStop | None) -> None:
        def wanted() -> tuple[Any, ...]:
            """Without those that were collected or cancelled while the service died and came back."""
            with self._lock:
                left = [group for group in groups if group.id in self._outstanding]
            return self._session, self._lane, left, early_stop

        def queued() -> list[str]:
            for group in groups:
                if group.id in self._outstanding:
                    self._outstanding[group.id].queued = True
            late = [group.id for group in groups if group.id in self._cancelled]
            self._cancelled -= set(late)
            return late

        if late := self._repeat("submit", wanted, lambda _: queued()):
            self._call("forget", late)  # the service may have heard of the cancellation before it had them

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._repeat(method, lambda: arguments)

    def _repeat(
        self, method: str, arguments: Callable[[], tuple[Any, ...]], note: Callable[[Any], Any] = lambda result: result
    ) -> Any:
        """Call the service, which may have died since: then it is told again what this client has to do with it.

        Args:
            note: takes what the method returned and writes down what another service would have to be told. It is
                called while no other thread can tell one, and only if the service that did the work is still the one
                that this client knows; else the call is repeated.

        Returns:
            What `note` returned.
        """
        end = None
        while True:
            sent = self._epoch
            try:
                epoch, result = ray.get(self._service.call.remote(sent, method, *arguments()))
                with self._lock:
                    if sent is None or epoch == sent:  # it was done
                        if self._epoch is None or self._epoch == epoch:
                            self._epoch = epoch
                            return note(result)
                    elif self._epoch == sent:  # no other thread has noticed yet
                        self._adopt(epoch)
            except RayTaskError as error:
                raise own_error(error) from None
            except RayActorError as error:
                end = end or time.monotonic() + RESTART_SECONDS
                if not isinstance(error, ActorUnavailableError) or time.monotonic() > end:
                    raise RunFailed(describe_death(error)) from None
                time.sleep(0.2)

    def _adopt(self, epoch: str) -> None:
        """Tell a service that was started anew what it has to know. If it dies meanwhile, the next call will find out.

        Called with the lock held. Groups whose `submit` has not returned yet are told by that.
        """
        calls: list[tuple[str, tuple[Any, ...]]] = []
        if self._publications:
            calls.append(("adopt", (self._lane, self._version, self._publications)))
        queued = [one for one in self._outstanding.values() if one.queued]
        for early_stop in {id(one.early_stop): one.early_stop for one in queued}.values():
            groups = [one.group for one in queued if one.early_stop is early_stop]
            calls.append(("submit", (self._session, self._lane, groups, early_stop)))
        for method, arguments in calls:
            ray.get(self._service.call.remote(epoch, method, *arguments))
        self._epoch = epoch


@dataclass
class _Outstanding:
    """A group that is to be collected."""

    group: GroupRequest
    early_stop: EarlyStop | None
    queued: bool = False
    """The service has it, as far as this client knows."""
