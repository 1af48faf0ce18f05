"""`forwardpass predict --top K`: the labels of each row, with their probabilities, printed or saved."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from forwardpass.client import Answer, Ranked
from forwardpass.console import tables
from forwardpass.errors import ForwardpassError

_SHOWN_ROWS = 20

Rows = Sequence[Sequence[Ranked]]


def show(answer: Answer, args: argparse.Namespace) -> None:
    """Print the ranking, or write it to --save. Raises ForwardpassError."""
    output = args.output[0] if args.output and len(args.output) == 1 else None
    rows = answer.top(args.top, output=output, softmax=args.softmax)
    if args.save is not None:
        _save(args.save, rows, args.top)
    if args.json:
        said = {"model": answer.model, "version": answer.version, "top": [_row_as_json(row) for row in rows]}
        print(json.dumps(said, ensure_ascii=False))
    elif args.save is not None:
        print(f"wrote {args.save}: labels of {len(rows)} rows, from {answer.model} version {answer.version}")
    else:
        print(f"{answer.model} version {answer.version}\n\n{_table(rows, args.top)}")
        if len(rows) > _SHOWN_ROWS:
            print(f"… {len(rows) - _SHOWN_ROWS} more rows: --save FILE or --json for all")


def _what(rows: Rows) -> str:
    """What the figures are."""
    return "value" if any(ranked.probability is None for row in rows for ranked in row) else "probability"


def _figure(ranked: Ranked) -> float:
    return ranked.value if ranked.probability is None else ranked.probability


def _header(rows: Rows, most: int) -> list[str]:
    places = min(most, max(map(len, rows), default=0)) or 1
    return [f"{name}_{place}" for place in range(1, places + 1) for name in ("label", _what(rows))]


def _cells(row: Sequence[Ranked], width: int, digits: str) -> list[str]:
    cells = [cell for ranked in row for cell in (ranked.label, format(_figure(ranked), digits))]
    return cells or ["NaN", *[""] * (width - 1)]


def _table(rows: Rows, most: int) -> str:
    header = _header(rows, most)
    digits = ".4f" if _what(rows) == "probability" else ".4g"
    lines = [[str(number), *_cells(row, len(header), digits)] for number, row in enumerate(rows[:_SHOWN_ROWS])]
    return tables.table(["row", *header], lines, range(1, len(header) + 1, 2))


def _row_as_json(row: Sequence[Ranked]) -> list[dict[str, object]]:
    return [
        {"label": ranked.label, "value" if ranked.probability is None else "probability": _figure(ranked)}
        for ranked in row
    ]


def _save(path: Path, rows: Rows, most: int) -> None:
    header = _header(rows, most)
    try:
        match path.suffix.lower():
            case ".json":
                path.write_text(json.dumps([_row_as_json(row) for row in rows], ensure_ascii=False) + "\n", "utf-8")
            case ".csv":
                with path.open("w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(header)
                    writer.writerows(_cells(row, len(header), "") for row in rows)
            case suffix:
                raise ForwardpassError(f"{path}: --top writes labels to .csv or .json, got '{suffix}'")
    except OSError as error:
        raise ForwardpassError(f"{path}: {error.strerror or error}") from None
