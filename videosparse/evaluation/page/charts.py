"""Charts as inline SVG, whose colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from videosparse.metrics.bootstrap import Interval

_WIDTH, _HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 44
_BESIDE = 4.0


@dataclass(frozen=True)
class Point:
    """A mean with its interval at some x; `label` is told when it is pointed at."""

    x: float
    y: Interval
    label: str


@dataclass(frozen=True)
class Series:
    """Points of one method, joined by a line.

    Args:
        name: for the legend.
        css: class that sets its colour.
        points: in the order of the line.
        dash: SVG dash pattern of the line, "" for none.
        hollow: whether marks are rings.
    """

    name: str
    css: str
    points: Sequence[Point]
    dash: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Level:
    """A dashed line across the chart: an anchor."""

    value: float
    name: str
    css: str
    upright: bool = False


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    levels: Sequence[Level] = (),
    *,
    ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """A figure with marks, whiskers and lines.

    Args:
        title: above it.
        x_label, y_label: of the axes.
        series: at least one with a point.
        levels: anchors.
        ticks: of the x axis; None chooses round ones.
    """
    points = [p for s in series for p in s.points]
    ys = [v for p in points for v in p.y] + [level.value for level in levels if not level.upright]
    xs = [p.x for p in points] + [level.value for level in levels if level.upright]
    y_ticks = round_ticks(min(ys), max(ys))
    x_ticks = [(x, _tidy(x)) for x in round_ticks(min(xs), max(xs))] if ticks is None else list(ticks)
    frame = _Frame(_span([x for x, _ in x_ticks], xs), _span(y_ticks, ys))
    parts = [*_grid(frame, x_ticks, y_ticks), *_levels(frame, levels)]
    # whiskers of several methods at one place stand beside each other
    beside = [_BESIDE * (number - (len(series) - 1) / 2) for number in range(len(series))]
    parts += [mark for s, off in zip(series, beside, strict=True) for mark in _marks(frame, s, off)]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="axis" transform="translate(12 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    named = escape(f"{title}: {y_label} against {x_label}; the table has the numbers")
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{named}">{"".join(parts)}</svg>'
    return f"<figure class=chart><figcaption>{escape(title)}</figcaption>{picture}</figure>"


def legend(series: Sequence[Series]) -> str:
    """Names and marks of series, once for several charts."""
    items = []
    for s in dict.fromkeys(series):
        mark = (
            f'<line x1="1" x2="27" y1="7" y2="7" class="line" stroke-dasharray="{s.dash}"/>'
            f'<circle cx="14" cy="7" r="4" class="{"ring" if s.hollow else "dot"}"/>'
        )
        items.append(
            f'<li><svg class="{s.css}" viewBox="0 0 28 14" aria-hidden="true">{mark}</svg>{escape(s.name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`, some `about` of them."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.05 * max(1.0, abs(low)), high + 0.05 * max(1.0, abs(high))
    raw = (high - low) / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * s for s in (1, 2, 5, 10) if size * s >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _tidy(value: float) -> str:
    return f"{value:.6g}"


def _span(ticks: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    low, high = min(*ticks, *values), max(*ticks, *values)
    return (low, high) if high > low else (low - 1, high + 1)


@dataclass(frozen=True)
class _Frame:
    """From values to pixels."""

    x_span: tuple[float, float]
    y_span: tuple[float, float]

    def x(self, value: float) -> float:
        share = (value - self.x_span[0]) / (self.x_span[1] - self.x_span[0])
        return _LEFT + 16 + share * (_WIDTH - _LEFT - _RIGHT - 32)

    def y(self, value: float) -> float:
        share = (value - self.y_span[0]) / (self.y_span[1] - self.y_span[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)


def _grid(frame: _Frame, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tidy(value)}</text>')
    for value, text in x_ticks:
        place = f'x="{frame.x(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}"'
        parts.append(f'<text {place} text-anchor="middle">{escape(text)}</text>')
    return parts


def _levels(frame: _Frame, levels: Sequence[Level]) -> list[str]:
    parts = []
    for number, level in enumerate(levels):
        if level.upright:
            x = frame.x(level.value)
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"'
            side = "end" if x > _WIDTH / 2 else "start"
            text = f'x="{x + (-5 if side == "end" else 5):.1f}" y="{_HEIGHT - _BOTTOM - 6}" text-anchor="{side}"'
        else:
            y = frame.y(level.value)
            ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            above = y - 5 if y > _TOP + 14 else y + 13
            # names of two anchors of nearly one value must not cover each other
            place, side = (_WIDTH - _RIGHT - 2, "end") if number % 2 else (_LEFT + 3, "start")
            text = f'x="{place}" y="{above:.1f}" text-anchor="{side}"'
        parts.append(f'<g class="{level.css}"><line class="level" {ends}/><text class="name" {text}>')
        parts.append(f"{escape(level.name)}</text></g>")
    return parts


def _marks(frame: _Frame, series: Series, off: float) -> list[str]:
    if not series.points:
        return []
    parts = [f'<g class="{series.css}">']
    if len(series.points) > 1:
        path = " ".join(f"{frame.x(p.x) + off:.1f},{frame.y(p.y.mean):.1f}" for p in series.points)
        parts.append(f'<polyline class="line" stroke-dasharray="{series.dash}" points="{path}"/>')
    for p in series.points:
        x, y = frame.x(p.x) + off, frame.y(p.y.mean)
        parts.append(
            f'<g><title>{escape(p.label)}</title><line class="whisker" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{frame.y(p.y.low):.1f}" y2="{frame.y(p.y.high):.1f}"/>'
            f'<circle class="{"ring" if series.hollow else "dot"}" cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>'
        )
    return [*parts, "</g>"]
