"""The rollout service while its processes are killed: real engines, real signals, and the same data.

The full version, with a hundred kills in one run, is `benchmarks/rollout_kills.py`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from benchmarks import rollout_kills
from benchmarks.rollout_kit import data_line, make_groups, read_lines, rollout_pool, write_checkpoint
from posttrain.errors import RunFailed
from rollouts.client import RolloutClient
from rollouts.log import recover
from rollouts.pool import RolloutPool
from rollouts.service import EarlyStop
from rollouts.types import Completion, GroupRequest

STUCK_SECONDS = 30.0
"""A new engine's first step takes about a second, and several times that on a busy machine: it is not stuck then."""
GROUPS = make_groups(24, samples=3)
POISON = [127, 127, 127]
"""This prompt ends every engine that comes to read it."""

POISON_PLUGIN = f"""
def install():
    import os
    from rollouts.engine import Engine
    step = Engine.step
    def poisoned(self):
        if any(sample.prompt_ids == {POISON} for sample in self.samples.values()):
            os._exit(1)
        return step(self)
    Engine.step = poisoned
"""


def install_poison(directory: Path) -> None:
    """A package with a vLLM plugin: vLLM calls it in every process that starts an engine."""
    (directory / "poison.py").write_text(POISON_PLUGIN)
    metadata = directory / "poison-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: poison\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\npoison = poison:install\n")


@dataclass
class Service:
    pool: RolloutPool
    client: RolloutClient
    log: Path
    expected: list[str]
    """The data of `GROUPS` when nothing is killed."""

    def run(self, prefix: str, kill: Callable[[], None]) -> list[str]:
        """Submit `GROUPS`, kill something in the middle, and return the data."""
        groups = [replace(group, id=f"{prefix}/{group.id}") for group in GROUPS]
        self.client.submit(groups)
        kill()
        ids = [group.id for group in groups]
        finished = self.client.collect(len(ids), ids)
        self.client.acknowledge(ids)
        return [data_line(group).replace(f"{prefix}/", "") for group in finished]

    def in_service(self, function: Callable[[Any], Any]) -> Any:
        """Run a function on the service, in its process."""
        return ray.get(self.pool._service.__ray_call__.remote(function))

    def busy_worker(self) -> int:
        """The process of a worker that is sampling and has logged some."""
        while True:
            found = self.in_service(
                lambda service: [
                    slot.worker.pid
                    for slot in service._fleet.slots.values()
                    if slot.worker and slot.beat and slot.beat.running and min(slot.beat.running.values()) > 5
                ]
            )
            if found:
                return random.choice(found)
            time.sleep(0.02)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("kills")
    write_checkpoint(directory)
    install_poison(directory)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(directory), before)))
    try:
        with rollout_pool(
            directory, directory / "log", stuck_seconds=STUCK_SECONDS, queue_samples=400, deaths=1
        ) as pool:
            client = pool.client()
            client.submit(GROUPS)
            ids = [group.id for group in GROUPS]
            expected = [data_line(group) for group in client.collect(len(ids), ids)]
            client.acknowledge(ids)
            yield Service(pool, client, directory / "log", expected)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def test_a_killed_worker_changes_nothing(service: Service) -> None:
    before = service.client.service_stats()
    found = service.run("killed", lambda: os.kill(service.busy_worker(), signal.SIGKILL))
    assert found == service.expected
    after = service.client.service_stats()
    assert after.deaths == before.deaths + 1 and after.quarantined == 0


def test_all_workers_killed_at_once_change_nothing(service: Service) -> None:
    killed: list[int] = []

    def kill() -> None:
        service.busy_worker()
        killed.extend(service.client.service_stats().workers.values())
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    before = service.client.service_stats()
    found = service.run("all", kill)
    after = service.client.service_stats()
    assert (after.deaths - before.deaths, after.stuck - before.stuck) == (len(killed), 0)
    assert found == service.expected


def test_a_stopped_process_is_noticed_and_replaced(service: Service) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(service.busy_worker())
        os.kill(stopped[0], signal.SIGSTOP)

    before = service.client.service_stats().stuck
    assert service.run("stopped", stop) == service.expected
    assert service.client.service_stats().stuck == before + 1
    assert not psutil.pid_exists(stopped[0]) or psutil.Process(stopped[0]).status() == psutil.STATUS_ZOMBIE


def test_a_stuck_engine_says_where_before_it_is_replaced(service: Service) -> None:
    """The actor answers, its engine's thread does not come back."""

    def hang(worker: Any) -> None:
        def never_returns() -> None:
            time.sleep(3600)

        worker._loop._calls.put((never_returns, Future()))

    def stick() -> None:
        pid = service.busy_worker()
        handles = service.in_service(
            lambda service: {
                slot.worker.pid: slot.worker.handle for slot in service._fleet.slots.values() if slot.worker
            }
        )
        ray.get(handles[pid].__ray_call__.remote(hang))

    assert service.run("stuck", stick) == service.expected
    dumps = [path.read_text() for path in service.log.glob("*.stacks")]
    assert any("never_returns" in dump and "samples in progress" in dump for dump in dumps)


def test_a_killed_service_changes_nothing(service: Service) -> None:
    def kill() -> None:
        service.busy_worker()
        os.kill(service.client.service_stats().pid, signal.SIGKILL)

    epoch = service.client.service_stats().epoch
    assert service.run("service", kill) == service.expected
    assert service.client.service_stats().epoch != epoch


def test_a_poisoned_request_is_given_up_and_no_other(service: Service) -> None:
    poison = GroupRequest("poison", POISON, GROUPS[0].sampling)
    service.client.submit([poison])
    assert service.run("beside", lambda: None) == service.expected
    (given_up,) = service.client.collect(1, ["poison"])
    assert given_up.completions == [] and "ended 3 engines in a row" in str(given_up.failure)
    service.client.acknowledge(["poison"])
    assert service.client.service_stats().quarantined == 1
    (written,) = map(json.loads, (service.log / "quarantine.jsonl").read_text().splitlines())
    assert (written["id"], written["prompt_ids"], written["reason"]) == ("poison", POISON, given_up.failure)


def test_workers_are_added_and_removed_during_a_run(service: Service) -> None:
    def resize() -> None:
        service.busy_worker()
        service.pool.resize(1)
        service.pool.resize(3)

    try:
        assert service.run("resized", resize) == service.expected
        until = time.monotonic() + 120
        while service.client.service_stats().ready != [0, 1, 2]:
            assert time.monotonic() < until
            time.sleep(0.5)
    finally:
        service.pool.resize(2)


def test_cancelled_groups_leave_the_engines(service: Service) -> None:
    groups = [replace(group, id=f"cancelled/{group.id}") for group in GROUPS]
    service.client.submit(groups)
    service.client.cancel([group.id for group in groups])
    assert service.run("after", lambda: None) == service.expected
    stats = service.client.service_stats()
    assert (stats.running, stats.waiting) == (0, 0)


def judge(request: GroupRequest, completion: Completion) -> float:
    """All answers to even prompts are right."""
    return 1.0 if request.index % 2 == 0 else float(len(completion.token_ids) % 2)


def test_a_group_is_stopped_early_if_asked_to(service: Service) -> None:
    groups = [replace(group, id=f"early/{group.id}", sampling=replace(group.sampling, n=16)) for group in GROUPS[:2]]
    service.client.submit(groups, EarlyStop(2, judge))
    first, second = service.client.collect(2, [group.id for group in groups])
    service.client.acknowledge([group.id for group in groups])
    assert 2 <= len(first.completions) < 16
    lengths = {len(completion.token_ids) % 2 for completion in second.completions}
    assert len(second.completions) == 16 or len(lengths) == 1


def test_submitting_waits_while_the_queue_is_full(service: Service) -> None:
    limit = service.in_service(lambda service: service.settings.queue_samples)
    many = [replace(group, id=f"many/{row}/{group.id}") for row in range(40) for group in GROUPS]
    assert len(many) * 3 > 5 * limit
    client = service.pool.client()
    submitter = threading.Thread(target=client.submit, args=(many,), daemon=True)
    submitter.start()
    queued = 0
    while queued < limit - 3:
        stats = client.service_stats()
        queued = stats.waiting + stats.running
        assert queued < limit + 3 and submitter.is_alive()
    client.cancel([group.id for group in many])
    submitter.join(60)
    assert not submitter.is_alive()
    stats = client.service_stats()
    assert (stats.waiting, stats.running, stats.ready_groups) == (0, 0, 0)


def test_a_killed_driver_changes_nothing(service: Service, tmp_path: Path) -> None:
    """The next driver opens the same log; each group is consumed once."""
    load = rollout_kills.Load(groups=40, samples=3, workers=1)
    write_checkpoint(tmp_path)
    place = tmp_path / "run"
    driver = rollout_kills.start(place, load)
    while rollout_kills.consumed(place) < 8:
        assert driver.poll() is None, (place / "driver.log").read_text()
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert 8 <= len(read_lines(place / "data.jsonl")) < load.groups
    rollout_kills.wait(rollout_kills.start(place, load))
    groups = make_groups(load.groups, load.samples)
    ids = [group.id for group in groups]
    service.client.submit(groups)
    undisturbed = {group.request.id: data_line(group) for group in service.client.collect(len(ids), ids)}
    service.client.acknowledge(ids)
    assert read_lines(place / "data.jsonl") == undisturbed


def test_a_full_disk_ends_the_run_and_no_sample_is_blamed(service: Service) -> None:
    """The last test with this service: it takes nothing more."""

    def fill(worker: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def fill_disks() -> None:
        service.busy_worker()
        handles = service.in_service(
            lambda service: [slot.worker.handle for slot in service._fleet.slots.values() if slot.worker]
        )
        ray.get([handle.__ray_call__.remote(fill) for handle in handles])

    quarantined = service.client.service_stats().quarantined
    with pytest.raises(RunFailed, match=r"the rollout log cannot be .*; free space"):
        service.run("full", fill_disks)
    assert service.client.service_stats().quarantined == quarantined
    expected = {group_id: completions for group_id, completions, _ in map(json.loads, service.expected)}
    logged = {name: found for name, found in recover(service.log).requests.items() if name.startswith("full/")}
    assert any(found.token_ids for found in logged.values())
    for name, found in logged.items():
        group_id, _, number = name.removeprefix("full/").partition("#")
        assert found.token_ids == expected[group_id][int(number)][0][: len(found.token_ids)]
