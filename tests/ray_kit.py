"""A Ray cluster for the actors of a test module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from tests.recipe_kit import ROOT


@contextmanager
def cluster_for_actors(num_cpus: float) -> Iterator[dict[str, object]]:
    """Start it, and give the options of an actor that claims `num_cpus` of its two."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        yield {"num_cpus": num_cpus, "runtime_env": {"env_vars": environment}}
    finally:
        ray.shutdown()
        patch.undo()
