"""Charts are SVG that says what it shows."""

import xml.etree.ElementTree as ET

import pytest

from videosparse.evaluation.page.charts import Level, Point, Series, chart, legend, round_ticks
from videosparse.metrics.bootstrap import Interval


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (13.2, 38.9, [10, 20, 30, 40]), (0.18, 0.22, [0.18, 0.19, 0.2, 0.21, 0.22])],
)
def test_ticks_are_round_and_hold_everything(low, high, ticks):
    assert round_ticks(low, high) == pytest.approx(ticks)


def test_one_value_still_has_an_axis():
    ticks = round_ticks(20, 20)
    assert ticks[0] < 20 < ticks[-1]


def test_marks_are_where_the_values_are():
    points = (Point(0.0, Interval(10, 10, 10), "low"), Point(1.0, Interval(20, 15, 20), "a < b"))
    figure = chart("Title", "x", "y", [Series("m", "s-m", points, "5 3", True)], [Level(15, "anchor", "s-dense")])
    svg = ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    assert circles[0][0] < circles[1][0]
    assert circles[0][1] > circles[1][1], "larger is higher"
    level = next(line for line in svg.iter("line") if line.get("class") == "level")
    assert float(level.get("y1")) == pytest.approx((circles[0][1] + circles[1][1]) / 2, abs=0.1)
    assert [t.text for t in svg.iter("title")] == ["low", "a < b"]
    assert svg.find(".//polyline").get("stroke-dasharray") == "5 3"
    assert "y against x" in svg.get("aria-label")
    assert legend([Series("m & n", "s-m", points)]).count("m &amp; n") == 1
