"""Lines as SVG: what is seen holds every point, and labels do not lie over each other."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from sousbatch.cli.report.charts import Line, line_chart, scatter_chart, spread, ticks, time_ticks
from sousbatch.cli.tables import format_size


def parsed(chart: str) -> ElementTree.Element:
    """Return the drawing of a chart; it is well-formed XML but for quotes that HTML does not need."""
    svg = re.search(r"<svg class=axes.*</svg>", chart, re.DOTALL)
    assert svg is not None
    return ElementTree.fromstring(re.sub(r"([\w-]+)=([^\s\"'>/]+)", r'\1="\2"', re.sub(r'"[^"]*"', _kept, svg[0])))


def _kept(quoted: re.Match[str]) -> str:
    return quoted[0].replace("=", "&#61;")


def line(*points: tuple[float, float], label: str = "run", key: str = "k0") -> Line:
    return Line(points=points, label=label, key=key)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 5.0), (100, 0.2)],
        [(0, 1e-5), (1_000_000, 2e-5)],
        [(10, -3.0), (20, 3.0)],
        [(5, 0.0), (6, 0.0)],
        [(7, 4.0)],
        [(1, 1e9), (2, 3e9)],
    ],
)
def test_what_is_seen_holds_every_point(points: list[tuple[float, float]]) -> None:
    plot = parsed(line_chart([line(*points)], title="Loss")).find("svg")
    assert plot is not None
    left, top, width, height = (float(one) for one in plot.attrib["viewBox"].split())
    assert width > 0 and height > 0
    drawn = [path.attrib["d"] for path in plot.iter("path") if "line" in path.attrib["class"]]
    found = [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([^ML]+)", drawn[0])]
    assert found == [pytest.approx(point, rel=1e-4) for point in points]
    assert all(left <= x <= left + width and top <= -y <= top + height for x, y in found)


def test_a_chart_without_points_is_not_drawn() -> None:
    assert line_chart([line()], title="Loss") == ""


def test_names_of_runs_are_text() -> None:
    chart = line_chart([line((1, 1), (2, 2), label='"><script>')], title="<i>")
    assert "<script>" not in chart and "<i>" not in chart.replace("<i>2</i>", "")
    parsed(chart)


def test_labels_at_the_ends_of_lines_stand_apart_and_inside() -> None:
    found = spread([10, 11, 12, 215, 219], 15, 220)
    assert found == sorted(found) and found[-1] <= 220
    assert all(after - before >= 15 for before, after in zip(found, found[1:], strict=False))
    lines = [line((0, 0), (1, 1 + n / 1000), label=f"run{n}", key=f"k{n}") for n in range(8)]
    ends = [text.attrib["y"] for text in parsed(line_chart(lines, title="Loss")).iter("text") if "class" in text.attrib]
    assert len(ends) == len(set(ends)) == 8


def test_more_than_eight_lines_have_no_labels_of_their_own() -> None:
    chart = line_chart([line((0, 0), (1, 1), label=f"run{n}") for n in range(9)], title="Loss")
    assert "class=ends" not in chart and "class=legend" not in chart


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.21, 0.24), (-5, 5), (0, 1e-5), (1e6, 3e6), (3, 3)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert len(found) <= 6 and all(low - 1e-9 <= one <= high + 1e-9 for one in found)
    assert len(found) >= 2 or low == high


@pytest.mark.parametrize("seconds", [0.5, 20, 100, 700, 4000, 90_000, 1e7])
def test_moments_are_round_and_few(seconds: float) -> None:
    found = time_ticks(seconds, 5)
    assert 2 <= len(found) <= 7 and found[0] == 0 and found[-1] <= seconds
    if seconds >= 120:
        assert all(one % 60 == 0 for one in found)


@pytest.mark.parametrize(
    ("num_bytes", "said"), [(0, "0 B"), (999, "999 B"), (999_499, "999 kB"), (999_700, "1 MB"), (2.5e12, "2.50 TB")]
)
def test_a_size_has_at_most_three_digits_before_its_unit(num_bytes: float, said: str) -> None:
    assert format_size(num_bytes) == said


def test_values_of_several_sizes_are_scattered_by_their_logarithm() -> None:
    chart = scatter_chart([(1e-4, 0.5, "k0", "a"), (1e-3, 0.2, "k1", "b"), (1e-2, 0.7, "k2", "c")], title="cer")
    texts = [text.text for text in parsed(chart).iter("text")]
    assert {"0.0001", "0.001", "0.01"} <= set(texts)
    assert [title.text for title in parsed(chart).iter("title")][0] == "a: 0.0001, 0.5"
