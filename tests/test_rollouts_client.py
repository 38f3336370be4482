"""A client with two threads whose service dies between a call's work and its return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from rollouts import client as module
from rollouts.client import RolloutClient
from rollouts.settings import EngineInfo
from rollouts.types import GroupRequest, Sampling


class Service:
    """What the client knows of the service, in this process; `call.remote` returns what `ray.get` calls here."""

    def __init__(self) -> None:
        self.call = self
        self.lives = 0
        self.restart()
        self.before: Callable[[str], None] = lambda method: None
        self.after: Callable[[str], None] = lambda method: None

    def restart(self) -> None:
        """It knows nothing any more."""
        self.lives += 1
        self.groups: set[str] = set()
        self.version: int | None = None

    def remote(self, epoch: str | None, method: str, *arguments: Any) -> Callable[[], tuple[str, Any]]:
        def get() -> tuple[str, Any]:
            self.before(method)
            own, result = str(self.lives), None
            if epoch in (None, own):
                result = getattr(self, method)(*arguments)
            self.after(method)
            return own, result

        return get

    def submit(self, session: str, lane: Any, groups: list[GroupRequest], early_stop: Any) -> None:
        self.groups |= {group.id for group in groups}

    def load_checkpoint(self, lane: Any, path: str, version: int) -> None:
        self.version = version

    def adopt(self, lane: Any, version: int, publications: list[Any]) -> None:
        self.version = version

    def forget(self, ids: list[str]) -> None:
        self.groups -= set(ids)

    def weight_version(self, lane: Any) -> int | None:
        return self.version


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(module.ray, "get", lambda reference: reference())
    return Service()


@pytest.fixture
def client(service: Service) -> RolloutClient:
    client = RolloutClient(service, (0, 1), EngineInfo(100, 64, 0.0))  # type: ignore[arg-type]
    client.load_checkpoint("first", 1)
    return client


def groups(*ids: str) -> list[GroupRequest]:
    return [GroupRequest(group_id, [1, 2], Sampling(4, n=2), row) for row, group_id in enumerate(ids)]


def dies_and_is_noticed(service: Service, client: RolloutClient, during: str) -> Callable[[str], None]:
    """Once: the service dies in a call of `during`, and another thread of the client notices first."""
    left = [1]

    def happen(method: str) -> None:
        if method == during and left:
            left.clear()
            service.restart()
            other = threading.Thread(target=client.weight_version)
            other.start()
            other.join(10)
            assert not other.is_alive()

    return happen


@pytest.mark.parametrize("moment", ["before", "after"])
def test_groups_that_a_service_took_into_its_grave_are_submitted_again(
    service: Service, client: RolloutClient, moment: str
) -> None:
    client.submit(groups("a"))
    setattr(service, moment, dies_and_is_noticed(service, client, "submit"))
    client.submit(groups("b", "c"))
    assert service.lives == 2
    assert service.groups == {"a", "b", "c"}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_weights_that_a_service_took_into_its_grave_are_published_again(
    service: Service, client: RolloutClient, moment: str
) -> None:
    setattr(service, moment, dies_and_is_noticed(service, client, "load_checkpoint"))
    client.load_checkpoint("second", 2)
    assert service.version == 2
    service.restart()
    assert client.weight_version() == 2


def test_what_was_cancelled_while_it_was_submitted_stays_cancelled(service: Service, client: RolloutClient) -> None:
    def cancel(method: str) -> None:
        if method == "submit":
            service.after = lambda method: None
            client.cancel(["b"])

    service.after = cancel
    client.submit(groups("a", "b"))
    assert service.groups == {"a"}
    service.restart()
    client.weight_version()
    assert service.groups == {"a"}
