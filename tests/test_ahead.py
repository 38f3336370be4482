"""Steps that are scheduled while the one before computes, as on a GPU, give what steps one after the other give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollouts.settings import engine_environment

ROOT = Path(__file__).resolve().parents[1]


def told(mode: str, directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.ahead_engine", mode, str(directory)]
    environment = {**os.environ, **engine_environment(1), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    alone, ahead = (told(mode, tmp_path_factory.mktemp(mode)) for mode in ("alone", "ahead"))
    return alone, ahead


def test_every_token_log_probability_version_route_and_mask_is_the_same(both: Any) -> None:
    alone, ahead = both
    assert ahead["samples"] == alone["samples"]
    assert ahead["scores"] == alone["scores"]


def test_the_story_holds_what_it_is_about(both: Any) -> None:
    alone, ahead = both
    # A step ahead: each time that vLLM begins anew, the first step has no tokens to give.
    assert ahead["empty_steps"] > alone["empty_steps"]
    samples = alone["samples"]
    assert {part[3] for part in samples["plain 70"]} == {1, 2}
    assert all(samples[name][-1][4] in ("stop", "length") for name in samples)
    assert any(samples[f"stops {length}"][-1][4] == "stop" for length in (1, 5, 33, 70))
    assert samples["routed 20"][0][5] and any(part[6] for part in samples["masked 9"])
    for parts in samples.values():  # no token twice, none left out
        ends = [part[0] + len(part[1]) for part in parts]
        assert [part[0] for part in parts] == [0, *ends[:-1]]
