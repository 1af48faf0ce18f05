"""Plots as inline SVG: lines, bars, heat. Pure: numbers in, text out; colours come from the page's style sheet.

Drawn 440 units wide, so that text stays legible on a phone; wider pages put plots side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44


@dataclass(frozen=True, slots=True)
class Axis:
    """`ticks`: (value, label). A logarithmic axis clamps values that are not above 0."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one; values beyond an end are clamped to it."""
        if self.log:
            value, low, high = math.log(max(value, 1e-12)), math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(frozen=True, slots=True)
class Series:
    """A line. `style`: CSS classes: s0 and s1 for the servers, dash and dots for the line style."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "s0"
    marks: bool = True
    joined: bool = True  # connect the points with a line


@dataclass(frozen=True, slots=True)
class Guide:
    """A straight line across the plot with a label, or, with `until`, a band."""

    value: float
    name: str
    vertical: bool = False
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Legend:
    entries: Sequence[tuple[str, str]] = field(default_factory=tuple)  # (style, name)


def linear(label: str, values: Sequence[float], form: Callable[[float], str] | None = None) -> Axis:
    """An axis from 0 to beyond the largest value."""
    high = max([v for v in values if math.isfinite(v)], default=1.0) or 1.0
    step = _nice(high / 4)
    high = math.ceil(high * 1.02 / step) * step
    ticks = [step * i for i in range(round(high / step) + 1)]
    return Axis(label, 0.0, high, [(t, (form or number)(t)) for t in ticks])


def logarithmic(label: str, values: Sequence[float], form: Callable[[float], str]) -> Axis:
    """A logarithmic axis around the values that begins and ends at 1, 2 or 5 times a power of ten."""
    good = [v for v in values if math.isfinite(v) and v > 0]
    low, high = (min(good), max(good)) if good else (1.0, 10.0)
    steps = [
        m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for m in (1, 2, 5)
    ]
    low = max(s for s in steps if s <= low * 1.000001)
    high = min(s for s in steps if s >= high * 0.999999 and s > low)
    inside = [s for s in steps if low <= s <= high * 1.000001]
    if len(inside) > 7:
        inside = [s for s in inside if math.isclose(math.log10(s), round(math.log10(s)), abs_tol=1e-9)]
    return Axis(label, low, high, [(s, form(s)) for s in inside], log=True)


def number(value: float) -> str:
    """1200 as 1.2k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """0.0002 as 200 µs."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def lines(title: str, x: Axis, y: Axis, series: Sequence[Series], guides: Sequence[Guide] = (), kind: str = "") -> str:
    """Lines with a legend below them."""
    parts = _frame(x, y)
    for guide in guides:
        parts += _guide(guide, x, y)
    for one in series:
        places = [(_x(x, a), _y(y, b)) for a, b in one.points if math.isfinite(a) and math.isfinite(b)]
        if len(places) > 1 and one.joined:
            parts.append(f'<polyline class="line {one.style}" points="{_path(places)}"/>')
        if one.marks or len(places) == 1:
            parts += [f'<circle class="mark {one.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places]
    return _figure(title, parts, [(one.style, one.name) for one in series], kind)


def bars(
    title: str, x_label: str, labels: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]], kind: str
) -> str:
    """Shares by category, side by side for each of `series`: (name, style, values between 0 and 1)."""
    most = max([v for _, _, values in series for v in values], default=0.0)
    y = linear("share", [most], lambda v: f"{v:.0%}")
    x = Axis(x_label, 0.0, float(max(len(labels), 1)), ())
    parts = _frame(x, y)
    width = (WIDTH - _LEFT - _RIGHT) / max(len(labels), 1)
    every = max(1, math.ceil(len(labels) * 44 / (WIDTH - _LEFT - _RIGHT)))
    bottom = HEIGHT - _BOTTOM
    for place, label in enumerate(labels):
        left = _LEFT + place * width
        for turn, (_, style, values) in enumerate(series):
            top = _y(y, values[place])
            wide = 0.86 * width / len(series)
            begin, high = left + 0.07 * width + turn * wide, max(bottom - top, 1)
            if values[place] > 0:
                parts.append(
                    f'<rect class="bar {style}" x="{begin:.1f}" y="{bottom - high:.1f}" width="{wide:.1f}" '
                    f'height="{high:.1f}"/>'
                )
        if place % every == 0:
            parts.append(f'<text class="tick" x="{left + width / 2:.1f}" y="{bottom + 15}">{escape(label)}</text>')
    return _figure(title, parts, [(style, name) for name, style, _ in series], kind)


def heat(
    title: str,
    x: Axis,
    y: Axis,
    cells: Sequence[tuple[float, float, float, float, float]],
    over: Sequence[Series],
    style: str,
) -> str:
    """Cells (x from, x to, y from, y to, strength between 0 and 1), and lines over them."""
    parts = []
    for left, right, low, high, strength in cells:
        a, b, top, bottom = _x(x, left), _x(x, right), _y(y, high), _y(y, low)
        if bottom > top:
            parts.append(
                f'<rect class="cell {style}" x="{a:.1f}" y="{top:.1f}" width="{b - a + 0.3:.1f}" '
                f'height="{bottom - top + 0.3:.1f}" opacity="{strength:.2f}"/>'
            )
    parts = _frame(x, y) + parts
    for one in over:
        places = [(_x(x, a), _y(y, b)) for a, b in one.points if math.isfinite(a) and math.isfinite(b)]
        parts.append(f'<polyline class="line {one.style}" points="{_path(places)}"/>')
    return _figure(title, parts, [(one.style, one.name) for one in over], "heat")


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)


def _frame(x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value, text in y.ticks:
        at = _y(y, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{at + 4:.1f}">{escape(text)}</text>')
    for value, text in x.ticks:
        at = _x(x, value)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 15}">{escape(text)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text class="label" x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}">{escape(x.label)}</text>')
    parts.append(f'<text class="label" transform="translate(12 {middle}) rotate(-90)">{escape(y.label)}</text>')
    return parts


def _guide(guide: Guide, x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    if guide.vertical:
        at = _x(x, guide.value)
        if guide.until is not None:
            width = max(_x(x, guide.until) - at, 1.0)
            return [f'<rect class="band" x="{at:.1f}" y="{_TOP}" width="{width:.1f}" height="{bottom - _TOP}"/>']
        side = ("end", -4) if at > WIDTH / 2 else ("start", 4)
        return [
            f'<path class="guide" d="M{at:.1f} {_TOP}V{bottom}"/>',
            f'<text class="word {side[0]}" x="{at + side[1]:.1f}" y="{_TOP + 12}">{escape(guide.name)}</text>',
        ]
    at = _y(y, guide.value)
    return [
        f'<path class="guide" d="M{_LEFT} {at:.1f}H{right}"/>',
        f'<text class="word start" x="{_LEFT + 4}" y="{at - 4:.1f}">{escape(guide.name)}</text>',
    ]


def _figure(title: str, parts: Sequence[str], legend: Sequence[tuple[str, str]], kind: str) -> str:
    entries = "".join(
        f'<span><svg viewBox="0 0 22 8" class="key"><path class="line {style}" d="M1 4H21"/></svg>{escape(name)}</span>'
        for style, name in legend
        if name
    )
    return (
        f'<figure data-plot="{escape(kind)}"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{entries}</div></figure>'
    )


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= value * 0.999999)
