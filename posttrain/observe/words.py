"""How numbers are written for people, the same in terminal and report."""

from __future__ import annotations

from typing import Any

from posttrain.observe.runview import is_number


def duration(seconds: float | None) -> str:
    """`0.13 s`, `4.2 s`, `12 s`, `3m 05s`, `1h 02m 03s`; a dash when unknown."""
    if not is_number(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.2g} s" if 0 < seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m {rest:02}s" if hours else f"{minutes}m {rest:02}s"


def percent(share: float | None, digits: int = 1) -> str:
    """`84.4 %`; a dash when unknown."""
    return f"{100 * share:.{digits}f} %" if is_number(share) else "–"


def points(difference: float | None) -> str:
    """A difference of two shares in percentage points, signed: `+12.3`."""
    return f"{100 * difference:+.1f}".replace("-", "−") if is_number(difference) else "–"


def number(value: Any) -> str:
    """Three or four significant digits: `0.0123`, `12.3`, `1,234`, `4.1e-7`."""
    if not is_number(value):
        return "–"
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def size(bytes_: float | None) -> str:
    """Bytes as `812 MiB` or `3.42 GiB`."""
    if not is_number(bytes_):
        return "–"
    mebibytes = bytes_ / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.2f} GiB"


def accuracies(by_domain: dict[str, float]) -> str:
    """`arithmetic 84.4 %, letters 71.0 %`."""
    return ", ".join(f"{domain} {percent(value)}" for domain, value in by_domain.items())
