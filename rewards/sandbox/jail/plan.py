"""What the launcher asks of the jail (read from it as JSON), and what the jail reports on its protections."""

from __future__ import annotations

from typing import Any, NamedTuple


class Plan(NamedTuple):
    """One execution."""

    files: dict[str, str]
    """Text of the files in the program's directory, by name."""
    main: str
    """The one to run."""
    arguments: list[str]
    executable: str
    """The Python interpreter, its links resolved."""
    prefix: str
    """Its installation."""
    limits: dict[str, Any]
    """The fields of `Limits`."""
    demand: bool
    """Do not start the program unless it is isolated."""
    control: int
    """Descriptor: the program must end when the other side is closed."""
    status: int
    """Descriptor: gets one JSON object in the end."""
    channels: list[int]
    """Descriptors that the program gets, as 3, 4, ..."""


class Report:
    """Which protections are in place and how, and why others are not."""

    def __init__(self, active: dict[str, str] | None = None, missing: dict[str, str] | None = None) -> None:
        self.active, self.missing = dict(active or {}), dict(missing or {})

    def add(self, other: dict[str, dict[str, str]]) -> None:
        """Join what another process of the jail reports."""
        self.active |= other["active"]
        self.missing |= other["missing"]

    def uncovered(self) -> list[str]:
        """What the program could reach in spite of all protections in place; nothing if it counts as isolated."""
        ways = {
            "the network": ("network", "seccomp"),
            "files": ("mounts", "landlock"),
            "other processes": ("processes", "seccomp"),
            "the caller's privileges": ("user", "seccomp"),
        }
        return [what for what, either in ways.items() if not any(one in self.active for one in either)]
