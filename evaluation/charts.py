"""Small charts as inline SVG text: no library, no script, nothing fetched. Colours are those of report.css."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Series = Sequence[tuple[float, float]]

WIDTH = 560
"""Units of a chart: as many pixels on a desk, and two thirds of that on a telephone, where text must stay legible."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 40
_BAR, _GAP, _LABEL, _VALUE = 22, 16, 96, 200
_LETTER, _KEY = 9, 20
"""Units of a letter of a bar's name, and of a row of a legend."""
_LONGEST = 24
"""Letters of a name that are shown."""


def line_chart(series: Mapping[str, Series], x_label: str, y_label: str, height: int = 280) -> str:
    """Lines over a shared pair of axes, with their names below where there are several. `series` maps a name to its
    (x, y) points, drawn in the order given."""
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return "<p class='empty'>no points recorded</p>"
    legend = _KEY * -(-len(series) // 2) if len(series) > 1 else 0
    place, axes = _axes(points, x_label, height)
    parts = [_open(WIDTH, height + legend, f"{y_label} over {x_label}"), *axes]
    for number, (name, line) in enumerate(series.items()):
        parts.append(_line(name, [place(x, y) for x, y in line if math.isfinite(y)], number))
        if len(series) > 1:
            column, row = number % 2, number // 2
            across = _LEFT + column * (WIDTH - _LEFT - _RIGHT) / 2
            parts.append(_legend(_short(name), across, height + 14 + _KEY * row, number))
    return "\n".join([*parts, "</svg>"])


def dot_chart(points: Series, x_label: str, y_label: str, height: int = 280) -> str:
    """A dot for each (x, y), without lines."""
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        return "<p class='empty'>no points recorded</p>"
    place, axes = _axes(points, x_label, height)
    dots = ((*place(x, y), f"{x:g}, {y:g}") for x, y in points)
    circles = [
        f"<circle class='dot s0' cx='{x:.1f}' cy='{y:.1f}' r='3.5'><title>{t}</title></circle>" for x, y, t in dots
    ]
    return "\n".join([_open(WIDTH, height, f"{y_label} over {x_label}"), *axes, *circles, "</svg>"])


def _axes(points: Series, x_label: str, height: int) -> tuple[Callable[[float, float], tuple[float, float]], list[str]]:
    """Where a point is drawn, and the grid with its numbers; y begins at 0, or below it."""
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), 8)
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points), 5)
    plot_width, plot_height = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * plot_width, _TOP + (1 - up) * plot_height

    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text class='tick' x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{tick:g}</text>")
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f"<text class='tick' x='{x:.1f}' y='{height - 22}' text-anchor='middle'>{tick:g}</text>")
    parts.append(f"<text class='axis' x='{WIDTH - _RIGHT}' y='{height - 5}' text-anchor='end'>{escape(x_label)}</text>")
    return place, parts


def bar_chart(bars: Mapping[str, tuple[float, tuple[float, float] | None]], label: str) -> str:
    """Horizontal bars from 0 to 100 %. `bars` maps a name to its share and, where known, its interval (a whisker)."""
    height = len(bars) * (_BAR + _GAP) + 22
    left = max(_LABEL, max((len(_short(name)) for name in bars), default=0) * _LETTER + 12)
    span = WIDTH - left - _VALUE
    parts = [_open(WIDTH, height, label)]
    for percent in range(0, 101, 25):
        x = left + span * percent / 100
        parts.append(f"<line class='grid' x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height - 20}'/>")
        parts.append(f"<text class='tick' x='{x:.1f}' y='{height - 5}' text-anchor='middle'>{percent}%</text>")
    for number, (name, (share, interval)) in enumerate(bars.items()):
        top = number * (_BAR + _GAP) + _GAP / 2
        middle = top + _BAR / 2
        parts.append(
            f"<text class='name' x='{left - 12}' y='{middle + 5}' text-anchor='end'>{escape(_short(name))}</text>"
        )
        width = f"{span * share:.1f}"
        parts.append(f"<rect class='bar s{number % 4}' x='{left}' y='{top}' width='{width}' height='{_BAR}' rx='3'/>")
        note = ""
        if interval:
            low, high = (left + span * side for side in interval)
            parts.append(
                f"<path class='whisker' d='M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} "
                f"{middle - 5}v10'/>"
            )
            note = f"<tspan class='note' dx='8'>{interval[0]:.1%} – {interval[1]:.1%}</tspan>"
        parts.append(f"<text class='value' x='{WIDTH - _VALUE + 16}' y='{middle + 5}'>{share:.1%}{note}</text>")
    return "\n".join([*parts, "</svg>"])


def stage_bar(seconds: Mapping[str, float]) -> str:
    """One bar cut into stages by their seconds, with a legend that carries the numbers."""
    total = sum(seconds.values()) or 1.0
    rows = -(-len(seconds) // 2)
    parts = [_open(WIDTH, 44 + 24 * rows, "seconds by stage")]
    x = 0.0
    for number, (name, value) in enumerate(seconds.items()):
        width = WIDTH * value / total
        parts.append(
            f"<rect class='stage s{number % 8}' x='{x:.1f}' y='0' width='{max(0.0, width - 1.5):.1f}' height='26'>"
            f"<title>{escape(name)}: {value:.1f} s</title></rect>"
        )
        column, row = number % 2, number // 2
        text = f"{name}: {value:.1f} s"
        parts.append(_legend(text, column * WIDTH / 2, 48 + 24 * row, number % 8))
        x += width
    return "\n".join([*parts, "</svg>"])


def _short(name: str) -> str:
    """A name as a chart shows it: its end, which tells names apart, where it is long."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def _open(width: int, height: int, label: str) -> str:
    return f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{escape(label, quote=True)}'>"


def _line(name: str, places: Sequence[tuple[float, float]], number: int) -> str:
    """A line, with dots where there are few points."""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = "".join(f"<circle class='dot s{number}' cx='{x:.1f}' cy='{y:.1f}' r='3.5'/>" for x, y in places)
    return f"<path class='line s{number}' d='{path}'><title>{escape(name)}</title></path>" + (
        dots if len(places) <= 30 else ""
    )


def _legend(text: str, x: float, y: float, number: int) -> str:
    return (
        f"<rect class='key s{number}' x='{x:.1f}' y='{y - 9:.1f}' width='11' height='11' rx='2'/>"
        f"<text class='tick' x='{x + 17:.1f}' y='{y + 1:.1f}'>{escape(text)}</text>"
    )


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers, about `count` of them, from at or below `low` to at or above `high`; at least two."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude * count >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
