"""What a check of `posttrain doctor` found, and how it is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from posttrain.errors import BadInput, RunFailed

Status = Literal["ok", "warning", "failed", "skipped"]
MARKS: dict[Status, str] = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "skipped": "not tried"}


@dataclass(frozen=True)
class Verdict:
    """One line of the examination."""

    check: str
    status: Status
    found: str
    remedy: str = ""
    """What to do about it; empty when there is nothing to do."""
    bad_input: bool = False
    """The recipe, or what it names, is wrong: exit code 2 rather than 1."""

    def line(self) -> str:
        """For the terminal and for a log file."""
        remedy = f"\n{'':>12}→ {self.remedy}" if self.remedy else ""
        return f"{MARKS[self.status]:>9}   {self.check}: {self.found}{remedy}"


def tried(check: str, look: Callable[[], Verdict | Iterable[Verdict]]) -> Iterator[Verdict]:
    """The verdicts of `look`; what it raises is a verdict too, so that one failure does not hide the next."""
    try:
        found = look()
        yield from [found] if isinstance(found, Verdict) else found
    except BadInput as error:
        yield Verdict(check, "failed", str(error), bad_input=True)
    except RunFailed as error:
        yield Verdict(check, "failed", str(error))
    except Exception as error:  # whatever goes wrong in a check would go wrong in the run
        yield Verdict(check, "failed", f"{type(error).__name__}: {error}")
