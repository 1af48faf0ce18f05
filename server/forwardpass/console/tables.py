"""Plain-text tables and numbers with units, for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Columns two spaces apart, right-aligned except those at the indices `left`."""
    every = [headers, *rows]
    widths = [max(len(row[place]) for row in every) for place in range(len(headers))]
    lines = []
    for row in every:
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def shape(sizes: Sequence[int] | None) -> str:
    """[4,10]; ? if unknown."""
    return "?" if sizes is None else f"[{','.join(str(size) for size in sizes)}]"


def count(number: float | None) -> str:
    """A whole number with groups of three: 1,234,567; ? if unknown."""
    return "?" if number is None else f"{number:,.0f}"


def si(number: float, unit: str = "") -> str:
    """Three digits and a prefix: 12.3 k, 4.56 G, 780 µ. The unit follows the prefix."""
    if number == 0:
        return f"0 {unit}".rstrip()
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
        if abs(number) >= factor * 0.9995:
            return f"{_digits(number / factor)} {prefix}{unit}".rstrip()
    return f"{_digits(number * 1e9)} n{unit}"


def _digits(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 99.95 else f"{number:.3g}"
