"""Draw lines as SVG that has the width of the reader's window.

What is drawn inside a plot has the units of the data: its `viewBox` is the range that is seen, so that the page's
script zooms by changing that alone, and reads values from the very path. Axes and labels are placed in percent around
it. Nothing is given as a style, which the page's policy would refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

from ..tables import format_size
from .curves import Points
from .markup import format_number, format_time

Unit = Literal["", "step", "s", "B", "log"]
_MOST_DOTS = 60
_MOST_NAMED = 8
_LINE_PX = 15  # between two labels


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart; *key* is the class that colours it.

    A step keeps its value until the next point.
    """

    points: Points
    label: str
    key: str
    is_step: bool = False
    has_dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a plot shows: from *left* to *right*, and from *low* to *high*."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> str:
        """Return where *value* stands from the left, in percent."""
        return f"{100 * (value - self.left) / (self.right - self.left):.2f}%"

    def y(self, value: float) -> float:
        """Return where *value* stands from the top, as a share."""
        return (self.high - value) / (self.high - self.low)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x: Unit = "step",
    y: Unit = "",
    height: int = 220,
    right: float | None = None,
    with_names: bool = True,
) -> str:
    """Return lines over a common axis; few of them have their labels at their ends.

    The first is drawn over the others. Where there are none, nothing is returned. The axis reaches to *right*.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    seen = _range_of(lines, right)
    is_named = with_names and len(lines) <= _MOST_NAMED and any(line.label for line in lines)
    can_be_log = not y and all(value > 0 for line in lines for _, value in line.points) and seen.high > 4 * seen.low
    ends = _end_labels(lines, seen, height) if is_named else ""
    drawn = "".join(_draw(line) for line in reversed(lines))
    return plot(
        title=title,
        seen=seen,
        inside=f'<g transform="scale(1 -1)">{drawn}</g>',
        beside=_y_axis(seen, y) + ends,
        x=x,
        y=y,
        height=height,
        legend=_legend(lines, y) if is_named else "",
        classes=("lines", "named" * is_named, "log" * can_be_log, "timed" * (x == "s")),
    )


def scatter_chart(dots: Sequence[tuple[float, float, str, str]], *, title: str, height: int = 180) -> str:
    """Return dots of (x, y, key, label).

    The axis of x is logarithmic where its values are of several sizes.
    """
    xs = [x for x, _, _, _ in dots]
    is_log = min(xs) > 0 and max(xs) >= 30 * min(xs)
    lines = [Line(points=((math.log10(x) if is_log else x, y),), label=name, key=key) for x, y, key, name in dots]
    seen = _range_of(lines, None)
    left, right = min(line.points[0][0] for line in lines), max(line.points[0][0] for line in lines)
    pad = 0.06 * (right - left)
    seen = replace(seen, left=left - pad, right=right + pad)
    drawn = "".join(
        f'<path class="dots {line.key}" d="M{line.points[0][0]:.6g} {line.points[0][1]:.5g}h0">'
        f"<title>{escape(f'{line.label}: {format_number(x)}, {format_number(y)}')}</title></path>"
        for line, (x, y, _, _) in zip(lines, dots, strict=True)
    )
    return plot(
        title=title,
        seen=seen,
        inside=f'<g transform="scale(1 -1)">{drawn}</g>',
        beside=_y_axis(seen, ""),
        x="log" if is_log else "",
        height=height,
        classes=("scatter",),
    )


def plot(
    *,
    title: str,
    seen: Range,
    inside: str,
    beside: str = "",
    x: Unit,
    y: Unit = "",
    height: int,
    legend: str = "",
    classes: Iterable[str] = (),
) -> str:
    """Return a chart of what is drawn *inside* its range, and *beside* it."""
    words = " ".join(filter(None, ("chart", *classes)))
    box = f"{seen.left:.6g} {-seen.high:.6g} {seen.right - seen.left:.6g} {seen.high - seen.low:.6g}"
    unit = {"s": "time since the first event", "step": "optimizer step"}.get(x, "")
    return (
        f'<figure class="{words}" data-x="{x}" data-y="{y}"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<svg class=axes height={height} role=img aria-label="{escape(title)}">'
        f"<g class=x>{_x_axis(seen, x)}</g>{beside}"
        f'<svg class=plot width="100%" height="100%" viewBox="{box}" preserveAspectRatio=none>{inside}</svg></svg>'
        f"<p class=unit>{unit}</p></figure>"
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most *most* round numbers from *low* to *high*, evenly spread."""
    span = (high - low) / most
    power = 10.0 ** math.floor(math.log10(span)) if span > 0 else 1.0
    step = next(one * power for one in (1, 2, 5, 10) if one * power >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + place) * step for place in range(max(0, count))]


def time_ticks(high: float, most: int) -> list[float]:
    """Return about *most* moments from 0 to *high*.

    They are round in minutes, hours or days.
    """
    units = (1, 60, 3600, 86400)
    unit = max((one for one in units if one <= high / 2), default=1)
    if unit in (60, 3600):
        steps = [count * unit for count in (1, 2, 5, 10, 15, 30, 60)] if unit == 60 else []
        steps += [count * 3600 for count in (1, 2, 4, 6, 12, 24)]
        step = next((one for one in steps if high / one <= most), 86400)
        return [place * step for place in range(int(high / step) + 1)]
    return [value * unit for value in ticks(0, high / unit, most)]


def format_tick(value: float, unit: Unit) -> str:
    """Return a number of an axis."""
    if unit == "s":
        return f"{value:g} s" if 0 < value < 60 else format_time(value) if value else "0"
    if unit == "B":
        return format_size(value) if value else "0"
    if unit == "log":
        return f"{10**value:.3g}"
    return f"{value:,.0f}" if unit == "step" else format_number(value) if value else "0"


def _range_of(lines: Sequence[Line], right: float | None) -> Range:
    xs = [place for line in lines for place, _ in line.points]
    ys = [value for line in lines for _, value in line.points]
    low, high = min(ys), max(ys)
    if 0 <= low < 0.4 * high or low == high == 0:
        low = 0.0
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    left, end = (0.0 if min(xs) >= 0 else min(xs)), max(xs) if right is None else right
    return Range(left=left, right=end if end > left else left + 1, low=low - pad * (low != 0), high=high + pad)


def _x_axis(seen: Range, unit: Unit) -> str:
    places = time_ticks(seen.right, 5) if unit == "s" else ticks(seen.left, seen.right, 5)
    if unit == "step" or (unit == "log" and seen.right - seen.left >= 2):
        places = [place for place in places if place == int(place)]
    return "".join(
        f'<line x1="{seen.x(place)}" x2="{seen.x(place)}" y1="0" y2="100%"/>'
        f'<text x="{seen.x(place)}" y="100%" dy=16>{format_tick(place, unit)}</text>'
        for place in places
    )


def _y_axis(seen: Range, unit: Unit) -> str:
    lines = (
        f'<line x1="0" x2="100%" y1="{seen.y(place):.2%}" y2="{seen.y(place):.2%}"/>'
        f'<text x=-8 y="{seen.y(place):.2%}" dy=4>{format_tick(place, unit)}</text>'
        for place in ticks(seen.low, seen.high, 4)
    )
    return f"<g class=y>{''.join(lines)}</g>"


def _draw(line: Line) -> str:
    """Return a line, and a dot on each of a few points."""
    (x, y), *rest = line.points
    form = "H{:.7g}V{:.5g}" if line.is_step else "L{:.7g} {:.5g}"
    path = [f"M{x:.7g} {y:.5g}", *(form.format(*point) for point in rest)]
    dots = ""
    if line.has_dots and len(line.points) <= _MOST_DOTS or len(line.points) == 1:
        places = "".join(f"M{x:.7g} {y:.5g}h0" for x, y in line.points)
        dots = f'<path class="dots {line.key}" d="{places}"/>'
    return f'<path class="line {line.key}" data-label="{escape(line.label)}" d="{"".join(path)}"/>{dots}'


def _end_labels(lines: Sequence[Line], seen: Range, height: int) -> str:
    """Return the labels at the ends of the lines, moved apart."""
    wanted = sorted((line for line in lines if line.label), key=lambda line: -line.points[-1][1])
    places = spread([seen.y(line.points[-1][1]) * height for line in wanted], _LINE_PX, height)
    texts = (
        f'<text class="{line.key}" x="100%" dx=6 y="{place / height:.1%}" dy=4>{escape(short(line.label))}</text>'
        for place, line in zip(places, wanted, strict=True)
    )
    return f"<g class=ends>{''.join(texts)}</g>"


def spread(places: Sequence[float], gap: float, most: float) -> list[float]:
    """Return rising *places* at least *gap* apart, none beyond *most* where they fit."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else place)
    limit = most
    for number in range(len(found) - 1, -1, -1):
        found[number] = min(found[number], limit)
        limit = found[number] - gap
    return found


def short(label: str, most: int = 20) -> str:
    """Return a label of at most *most* characters, those at its end."""
    return label if len(label) <= most else f"\u2026{label[1 - most :]}"


def _legend(lines: Sequence[Line], unit: Unit) -> str:
    marks = (
        f'<span class="mark {line.key}">{escape(line.label)} <i>{format_tick(line.points[-1][1], unit)}</i></span>'
        for line in lines
    )
    return f"<span class=legend>{''.join(marks)}</span>"
