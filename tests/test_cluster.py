"""How a Ray cluster of our own is started."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray._private import node, services

from posttrain.cluster import SLOW_START, _children, _start_ray

OPTIONS = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 << 20}


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception]]:
    """What Ray raises when it asks for its node, which was just started; first things first, then nothing."""
    ask, raised = services.get_node, list[Exception]()

    def get_node(*arguments: Any, **options: Any) -> Any:
        if raised:
            raise raised.pop(0)
        return ask(*arguments, **options)

    monkeypatch.setattr(services, "get_node", get_node)
    yield raised
    ray.shutdown()


def test_a_slow_start_is_given_up_and_tried_once_more(
    failures: list[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    failures.append(Exception(f"{SLOW_START}. This could happen because the raylet failed to start"))
    before = _children()
    _start_ray(**OPTIONS)
    assert ray.is_initialized() and not failures
    assert [one.name() for one in _children() - before].count("raylet") == 1
    assert "trying once more" in capsys.readouterr().out


def test_a_second_slow_start_and_other_errors_are_raised(failures: list[Exception]) -> None:
    failures += [Exception(SLOW_START), Exception(SLOW_START)]
    with pytest.raises(Exception, match=SLOW_START):
        _start_ray(**OPTIONS)
    assert not failures
    failures += [Exception("no disk"), Exception("not asked for")]
    with pytest.raises(Exception, match="no disk"):
        _start_ray(**OPTIONS)
    assert len(failures) == 1


def test_ray_still_says_so_and_has_no_setting_for_it() -> None:
    """When this fails, `_start_ray` may have become a setting."""
    source = inspect.getsource(node)
    assert SLOW_START in source and "raylet_start_wait_time_s = 30" in source
