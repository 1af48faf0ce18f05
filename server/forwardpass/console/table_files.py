"""Read a file of named columns for a model's inputs: CSV with a header, Parquet, JSON records. No network.

Whole files at once: a table's columns lie in memory, then its inputs do. What is no table, such as a CSV file without a
header or with columns that the model has no names for, is left to `array_files`. Errors name the file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forwardpass.client.arrays import TensorInfo
from forwardpass.client.errors import InvalidArgument
from forwardpass.client.tables import Columns, arrays_of, columns_in, expected_columns, is_text
from forwardpass.console.csv_cells import is_number
from forwardpass.errors import ForwardpassError
from forwardpass.optional_imports import need

PARQUET: Final = (".parquet", ".pq")
LINES: Final = (".jsonl", ".ndjson")
_TRUTHS: Final = {"true": True, "false": False, "1": True, "0": False}


def read_table(
    path: Path, stdin: io.StringIO, model: str, inputs: Sequence[TensorInfo]
) -> dict[str, NDArray[Any]] | None:
    """The inputs, arrays [rows, ...] by name, that a file of columns makes; `-` is the JSON in `stdin`.

    None for a file that is no table. Raises ForwardpassError.
    """
    suffix = ".json" if str(path) == "-" else path.suffix.lower()
    try:
        match suffix:
            case ".csv":
                columns: Columns | None = _csv_columns(path, inputs)
            case ".json":
                columns = _json_columns(stdin.getvalue() if str(path) == "-" else path.read_text("utf-8"), inputs)
            case _ if suffix in LINES:
                columns = columns_in(_records(path), inputs)
            case _ if suffix in PARQUET:
                columns = columns_in(_parquet(path), inputs)
            case _:
                return None
        return None if columns is None else arrays_of(columns, model, inputs)
    except OSError as error:
        raise ForwardpassError(f"{path}: {error.strerror or error}") from None
    except InvalidArgument as error:
        raise ForwardpassError(f"{path}: {error.details}") from None
    except ValueError as error:
        raise ForwardpassError(f"{path}: {error}") from None


def _json_columns(text: str, inputs: Sequence[TensorInfo]) -> Columns | None:
    try:
        return columns_in(json.loads(text), inputs)
    except json.JSONDecodeError:
        return None


def _parquet(path: Path) -> Any:
    arrow, parquet = need("pyarrow", "tables"), need("pyarrow.parquet", "tables")
    try:
        return parquet.read_table(path)
    except arrow.ArrowException as error:
        raise ForwardpassError(f"{path}: is not Parquet: {' '.join(str(error).split())}") from None


def _records(path: Path) -> list[Any]:
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    records = []
    for number, line in lines:
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ForwardpassError(f"{path}, line {number}: is not JSON: {error}") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise ForwardpassError(f"{path}: expected a JSON object in each line, with a value for each column")
    return records


def _csv_columns(path: Path, inputs: Sequence[TensorInfo]) -> dict[str, NDArray[Any]] | None:
    """A CSV file's columns by the names in its header; None: the model has no names for them, or the file none."""
    expected = expected_columns(inputs)
    named = len(inputs) > 1 or any(tensor.labels or tensor.categories for tensor in inputs)
    if not named:
        return None
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if all(is_number(cell) for cell in header):
            if len(inputs) > 1:
                names = ", ".join(expected[:8])
                raise ForwardpassError(
                    f"{path}: expected a first line with the names of the columns ({names}), got one without: choose "
                    f"one of the inputs by NAME={path}"
                )
            return None
        rows, lines = [], []
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise ForwardpassError(
                        f"{path}, line {reader.line_num}: has {len(cells)} cells; expected {len(header)}"
                    )
                rows.append(cells)
                lines.append(reader.line_num)
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ForwardpassError(f"{path}: expected columns of different names, got '{twice}' more than once")
    if not rows:
        raise ForwardpassError(f"{path}: has no rows")
    by_column = zip(header, zip(*rows, strict=True), strict=True)
    return {name: _cells(path, name, cells, lines, inputs) for name, cells in by_column}


def _cells(
    path: Path, name: str, cells: Sequence[str], lines: Sequence[int], inputs: Sequence[TensorInfo]
) -> NDArray[Any]:
    """A column as texts, truths, whole numbers or numbers, as its input needs it; of a column of no input, as texts."""
    if is_text(name, inputs) or name not in expected_columns(inputs):
        return np.array(cells, object)
    datatype = next(tensor.datatype for tensor in inputs if name in (tensor.labels or (tensor.name,)))
    if datatype == "BOOL":
        truths = [_TRUTHS.get(cell.strip().lower()) for cell in cells]
        if None in truths:
            row = truths.index(None)
            raise ForwardpassError(f"{path}, line {lines[row]}: '{name}': expected true or false, got {cells[row]!r}")
        return np.array(truths, bool)
    texts = np.array(cells)
    for dtype in (np.int64, np.float64):
        try:
            return texts.astype(dtype)
        except (ValueError, OverflowError):
            continue
    row = next((row for row, cell in enumerate(cells) if not cell.strip() or not is_number(cell)), 0)
    raise ForwardpassError(f"{path}, line {lines[row]}: '{name}': expected a number, got {cells[row]!r}")
