"""Matplotlib figures in one style: 1200 pixels wide, legible when shown at 800, on a light background."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forwardpass.errors import InsightError
from forwardpass.optional_imports import need

# Ten hues that are distinguishable on light and dark backgrounds.
HUES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


def add_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --png, the same for every command that draws."""
    parser.add_argument("--png", type=_drawable, metavar="FILE", help=f"draw {what}")


def _drawable(text: str) -> Path:
    """The path of a picture, rejected before anything is measured if it could not be drawn."""
    try:
        need("matplotlib", "insight")
    except InsightError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder")
    return path


def figure(columns: int, rows: int = 1, height: float = 4.2) -> tuple[Any, list[Any]]:
    """A figure 10 inches wide, and its axes from left to right and top to bottom. No window is opened."""
    matplotlib = need("matplotlib", "insight")
    matplotlib.use("agg")
    matplotlib.rcParams.update(_STYLE)
    drawn = need("matplotlib.figure", "insight").Figure(figsize=(10, height * rows), dpi=120, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    return drawn, list(axes.flat)


def save(drawn: Any, path: Path) -> None:
    """Write in the format of the file's suffix, PNG by default. Raises InsightError."""
    try:
        drawn.savefig(path)
    except (OSError, ValueError) as error:
        raise InsightError(f"{path}: cannot be written: {error}") from None


def hue(place: int) -> str:
    return HUES[place % len(HUES)]


def log_axis(axis: Any, ticks: Sequence[int]) -> None:
    """A logarithmic x axis for batch sizes, with each tick labelled in full."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()


def log_scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis for values that may lie close together: ticks at 1, 2 and 5 times powers of ten."""
    low, high = min(values) / 1.3, max(values) * 1.3
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    ticks = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
