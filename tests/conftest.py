"""What every test module needs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Ray reads this once in a process. A second cluster in another mode would lose its actors before they begin.
os.environ["RAY_AUTH_MODE"] = "disabled"

# Without a GPU, Triton kernels run in Triton's interpreter. Triton reads this once, when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests press Ctrl-C, in this process and in runs that they start. A shell's background job begins with it ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROCESSES = {
    f"test_{name}"
    for name in (
        *(
            "ahead",
            "async_resume",
            "async_service",
            "cli",
            "doctor",
            "export",
            "model_integrations",
            "native_engine",
            "observe",
            "pipeline",
            "pipeline_parts",
        ),
        *(
            "engine_weights",
            "rollouts_kills",
            "rollouts_randomness",
            "rollouts_service",
            "rundir",
            "serve",
            "setup",
            "trainers_actor",
            "trl_seam",
        ),
        "vllm_deepseek_v4",
    )
}
"""Modules that start Ray, engines or programs: they take longest, and so begin first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` gives each module to one of two processes, in this order (xdist's groups need an older pytest)."""
    items.sort(key=lambda item: item.path.stem not in PROCESSES)
