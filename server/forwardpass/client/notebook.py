"""What clients, models and answers look like in a notebook: HTML of their own facts, with every text escaped.

Pure, and calls no server: a notebook shows a value whenever a cell ends with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SHOWN_ROWS: Final = 10
SHOWN_COLUMNS: Final = 16
_SHOWN_TEXT: Final = 60  # characters of a cell


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]], below: str = "") -> str:
    """A table of texts; `below` is a line under it."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    note = f"<div>{escape(below)}</div>" if below else ""
    return (
        f"<div><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{note}</div>"
    )


def answer_table(
    caption: str, arrays: Mapping[str, NDArray[Any]], labels: Mapping[str, Sequence[str]], below: str
) -> str:
    """The first rows of outputs, side by side; of an output with labels, the label of the largest value comes first.

    Outputs that are no rows of values ([B, ...] with more axes, or of another length) are shown by their shape.
    """
    length = next((len(array) for array in arrays.values() if array.ndim), 0)
    header, columns = ["row"], [[str(row) for row in range(min(length, SHOWN_ROWS))]]
    for name, array in arrays.items():
        if array.ndim not in (1, 2) or len(array) != length:
            header.append(f"{name} {array.dtype}{list(array.shape)}")
            columns.append(["…"] * min(length, SHOWN_ROWS))
            continue
        rows = array[:SHOWN_ROWS].reshape(min(length, SHOWN_ROWS), -1)
        named = tuple(labels.get(name, ()))
        if named and len(named) == rows.shape[1] and rows.dtype.kind in "iuf":
            header.append(f"{name}: largest")
            columns.append([_largest(row, named) for row in rows])
        for place in range(min(rows.shape[1], SHOWN_COLUMNS)):
            header.append(_heading(name, place, rows.shape[1], named))
            columns.append([_number(value) for value in rows[:, place]])
        if rows.shape[1] > SHOWN_COLUMNS:
            header.append(f"… {rows.shape[1] - SHOWN_COLUMNS} more")
            columns.append(["…"] * len(rows))
    more = f"… {length - SHOWN_ROWS} more rows. " if length > SHOWN_ROWS else ""
    return table(caption, header, zip(*columns, strict=True), more + below)


def _heading(name: str, place: int, places: int, labels: Sequence[str]) -> str:
    if place < len(labels):
        return labels[place]
    return name if places == 1 else f"{name}[{place}]"


def _largest(row: NDArray[Any], labels: Sequence[str]) -> str:
    return "NaN" if row.dtype.kind == "f" and np.isnan(row).any() else labels[int(row.argmax())]


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, np.floating) else str(value)


def _cell(value: object) -> str:
    text = str(value)
    return escape(text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}…")
