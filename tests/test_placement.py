"""A run's actors get their room at once, or wait for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from posttrain import placement
from posttrain.placement import ACTOR_CPUS, actors_of, inside, reserve
from posttrain.recipe.schema import ClusterConfig

MOST = int(0.6 / ACTOR_CPUS)
"""Actors that fit on one CPU, but not twice."""


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_every_trainer_teacher_and_sampler_has_a_bundle() -> None:
    settings = ClusterConfig(trainers=2, rollout_workers=3, teacher_workers=4)
    assert actors_of(settings) == 9
    assert actors_of(settings, trainers=False) == 3


def test_a_second_run_waits_until_the_first_is_gone_and_says_so(one_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "TELL_SECONDS", 1)
    told: list[str] = []
    first = reserve(ClusterConfig(), MOST, told.append)
    assert not told
    said = threading.Event()

    def tell(message: str) -> None:
        told.append(message)
        said.set()

    second = []
    waiting = threading.Thread(target=lambda: second.append(reserve(ClusterConfig(), MOST, tell)))
    waiting.start()
    assert said.wait(60)
    assert not second and f"waiting for room for {MOST} actors" in told[0] and "CPUs are free" in told[0]
    remove_placement_group(first)
    waiting.join(60)
    assert len(second) == 1
    remove_placement_group(second[0])


def test_an_actor_takes_a_bundle_and_its_successor_the_same(one_cpu: None) -> None:
    class Named:
        def group(self) -> str | None:
            return ray.get_runtime_context().get_placement_group_id()

    room = reserve(ClusterConfig(), 1, pytest.fail)
    for _ in range(2):
        actor = ray.remote(Named).options(**inside(room)).remote()
        assert ray.get(actor.group.remote(), timeout=60) == room.id.hex()
        ray.kill(actor)
    remove_placement_group(room)
