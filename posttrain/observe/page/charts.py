"""Small SVG charts in the page's colours, all 360 units wide (a phone's width) so that their text stays legible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.observe.page.markup import Markup, element, joined
from posttrain.observe.words import number, percent

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MAX_POINTS = 180
"""Points that one line is thinned to."""
TICKS = 4
"""About so many intervals on a value axis."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. `colour` is a class of the style sheet (`c0`...); a `dashed` line is a part of another."""

    label: str
    points: Sequence[Point]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic mapping of [low, high] to [start, end] in drawing units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(v, self.low)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values inside the range."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers][:: max(1, math.ceil(len(powers) / 5))]
        step = round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def line_chart(
    title: str,
    note: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    zero: bool = False,
    log_floor: float | None = None,
    limit: float | None = None,
    smooth: bool = True,
) -> Markup:
    """A figure with a line for each series, and a legend with the value at its end.

    `smooth`: the line is the trailing mean over a twentieth of its points, with the values themselves behind it;
    otherwise it is the values, and the legend gives the largest.
    `zero`: the value axis includes 0. `log_floor`: logarithmic axis from there up; smaller values are drawn on it.
    `limit`: a value marked across.
    """
    series = [one for one in series if one.points]
    values = [y for one in series for _, y in one.points] + ([limit] if limit is not None else [])
    horizontal = Scale(*_range([x for one in series for x, _ in one.points]), LEFT, WIDTH - RIGHT)
    if log_floor is None:
        vertical = Scale(*_rounded(*_range(values, zero)), HEIGHT - BOTTOM, TOP)
    else:
        top = 10.0 ** math.ceil(math.log10(2 * max(*values, 10 * log_floor)))
        vertical = Scale(log_floor, top, HEIGHT - BOTTOM, TOP, log=True)
    lines = [(one, smoothed(one.points) if smooth else list(one.points)) for one in series]
    marks = [_line(one, line, horizontal, vertical) for one, line in lines]
    if limit is not None:
        y = f"{vertical(limit):.1f}"
        marks.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="limit"))
        marks.append(
            element("text", f"limit {number(limit)}", x=WIDTH - RIGHT, y=f"{vertical(limit) - 5:.1f}", class_="end")
        )
    picture = element(
        "svg",
        _axes(horizontal, vertical, x_label),
        marks,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}. " + " ".join(_in_words(one) for one in series),
    )
    ends = [(one, line[-1][1] if smooth else max(y for _, y in line)) for one, line in lines]
    return _figure(title, note, picture, _legend(ends))


def dot_chart(title: str, note: str, rows: Sequence[tuple[str, str, float, Sequence[float] | None]]) -> Markup:
    """A figure with an accuracy for each row (label, colour, share, 95 % interval): a dot on a band, 0 to 100 %."""
    label_width, row_height, value_width = 142, 25, 50
    height = 12 + row_height * len(rows) + 26
    scale = Scale(0.0, 1.0, label_width, WIDTH - value_width)
    marks = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = f"{scale(tick):.1f}"
        marks.append(element("line", x1=x, x2=x, y1=4, y2=height - 24, class_="grid"))
        marks.append(element("text", f"{tick:.0%}", x=x, y=height - 8, class_="middle"))
    for index, (label, colour, share, interval) in enumerate(rows):
        y = 16 + row_height * index
        low, high = interval or (share, share)
        shown = label if len(label) <= 22 else f"{label[:10]}…{label[-11:]}"
        marks += [
            element("text", element("title", label), shown, x=0, y=y + 4, class_="ink"),
            element("line", x1=f"{scale(low):.1f}", x2=f"{scale(high):.1f}", y1=y, y2=y, class_=f"band {colour}"),
            element("circle", cx=f"{scale(share):.1f}", cy=y, r=3.5, class_=f"dot {colour}"),
            element("text", percent(share), x=WIDTH, y=y + 4, class_="end ink strong"),
        ]
    words = "; ".join(f"{label} {percent(share)}" + _interval_words(interval) for label, _, share, interval in rows)
    picture = element("svg", marks, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=f"{title}: {words}.")
    return _figure(title, note, picture, None)


def _figure(title: str, note: str, picture: Markup, legend: Markup | None) -> Markup:
    caption = element("figcaption", element("strong", title), element("span", note, class_="note") if note else None)
    return element("figure", caption, picture, legend, class_="card chart")


def _interval_words(interval: Sequence[float] | None) -> str:
    return f" ({percent(interval[0])} to {percent(interval[1])})" if interval else ""


def _range(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = abs(high) / 2 or 0.5
        return (low, high + pad) if zero else (low - pad, high + pad)
    return low, high


def _rounded(low: float, high: float) -> tuple[float, float]:
    """The range widened to whole steps of its ticks."""
    step = round_step((high - low) / TICKS)
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)


def _axes(horizontal: Scale, vertical: Scale, x_label: str) -> Markup:
    parts = []
    for tick in vertical.ticks(TICKS):
        y = vertical(tick)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(element("text", number(tick), x=LEFT - 6, y=f"{y + 4:.1f}", class_="end"))
    for tick in horizontal.ticks(5):
        parts.append(
            element("text", number(tick), x=f"{horizontal(tick):.1f}", y=HEIGHT - BOTTOM + 15, class_="middle")
        )
    parts.append(element("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="middle"))
    return joined(parts)


def _line(series: Series, line: Sequence[Point], horizontal: Scale, vertical: Scale) -> Markup:
    if len(line) == 1:
        (x, y) = line[0]
        return element("circle", cx=f"{horizontal(x):.1f}", cy=f"{vertical(y):.1f}", r=3, class_=f"dot {series.colour}")
    behind = None
    if line != list(series.points):
        behind = _polyline(series.points, horizontal, vertical, f"raw {series.colour}")
    dashes = " dashed" if series.dashed else ""
    return joined(behind, _polyline(line, horizontal, vertical, f"curve {series.colour}{dashes}"))


def _polyline(points: Sequence[Point], horizontal: Scale, vertical: Scale, classes: str) -> Markup:
    corners = " ".join(f"{horizontal(x):.1f},{vertical(y):.1f}" for x, y in thinned(points))
    return element("polyline", points=corners, class_=classes)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MAX_POINTS of them: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Trailing mean over a twentieth of the points."""
    window = max(1, len(points) // 20)
    result = []
    for index, (x, _) in enumerate(points):
        part = points[max(0, index + 1 - window) : index + 1]
        result.append((x, math.fsum(y for _, y in part) / len(part)))
    return result


def _legend(ends: Sequence[tuple[Series, float]]) -> Markup:
    """What each line is, with a value of it."""
    items = []
    for one, value in ends:
        dashes = " dashed" if one.dashed else ""
        line = element("line", x1=0, x2=22, y1=5, y2=5, class_=f"curve {one.colour}{dashes}")
        swatch = element("svg", line, viewBox="0 0 22 10", width=22, height=10, aria_hidden="true")
        items.append(element("li", swatch, element("span", one.label), element("b", number(value))))
    return element("ul", items, class_="legend")


def _in_words(series: Series) -> str:
    values = [y for _, y in series.points]
    return (
        f"{series.label}: from {number(values[0])} to {number(values[-1])} over {len(values)} points, "
        f"lowest {number(min(values))}, highest {number(max(values))}."
    )
