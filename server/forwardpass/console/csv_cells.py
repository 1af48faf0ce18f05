"""Lines of CSV as an array of one input's rows: of any part of a file, checked cell by cell. No I/O."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass import protocol
from forwardpass.client.arrays import TensorInfo
from forwardpass.errors import ForwardpassError


class CsvCells:
    """Parses parts of one CSV file, in order. Where numbers are expected, a first line with another cell is a header.

    `columns`: of every line, 0 until the first one was parsed. `whole`: numbers must be whole. `text`: any cell is one.
    """

    def __init__(self, path: Path, tensor: TensorInfo) -> None:
        self._path = path
        self._tensor = tensor
        datatype = protocol.DATATYPES.get(tensor.datatype)
        self._bool = datatype is not None and datatype.name == "BOOL"
        self.text = datatype is None or datatype.numpy is None
        self.whole = datatype is not None and datatype.numpy is not None and datatype.numpy.kind in "iub"
        self.columns = 0
        self._started = False

    def parse(self, text: str, first_line: int) -> NDArray[Any]:
        """The rows [lines, columns] of a part whose first line has this number. Raises ForwardpassError."""
        return self.rows(enumerate(csv.reader(io.StringIO(text, newline="")), first_line))

    def rows(self, numbered: Iterable[tuple[int, list[str]]]) -> NDArray[Any]:
        """As `parse`, of lines with their numbers. Empty ones are skipped."""
        lines = [(number, cells) for number, cells in numbered if cells]
        if lines and not self._started:
            self._started = True
            self.columns = len(lines[0][1])
            if not self.text and not all(is_number(cell) for cell in lines[0][1]):
                del lines[0]
        rows: list[list[Any]] = []
        for number, cells in lines:
            if len(cells) != self.columns:
                raise ForwardpassError(f"{self._path}, line {number}: has {len(cells)} cells; expected {self.columns}")
            rows.append(cells if self.text else self._numbers(number, cells))
        return exact(rows) if rows else np.empty((0, self.columns))

    def _numbers(self, number: int, cells: list[str]) -> list[Any]:
        for place, cell in enumerate(cells, 1):
            if not is_number(cell, self.whole):
                wanted = "a whole number" if self.whole else "a number"
                raise ForwardpassError(f"{self._path}, line {number}, cell {place}: expected {wanted}, got {cell!r}")
        return [int(cell) if self.whole else float(cell or "nan") for cell in cells]

    def shaped(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows with the axes that the model expects: a line has only columns."""
        if self._bool:
            rows = rows != 0
        elif self._tensor.datatype == "UINT64" and rows.dtype == np.int64 and (rows >= 0).all():
            rows = rows.astype(np.uint64)  # as parts with larger numbers are: together they would become floats
        trailing = self._tensor.shape[1:]
        if len(trailing) != 1 and min(trailing, default=1) >= 0 and math.prod(trailing) == self.columns:
            return rows.reshape(len(rows), *trailing)
        return rows


def exact(value: Any) -> NDArray[Any]:
    """Nested lists as an array, exactly: numpy turns whole numbers into floats if some need 64 bits unsigned."""
    array = np.asarray(value)
    if array.dtype != np.float64 or isinstance(value, np.ndarray):
        return array
    whole = np.asarray(value, object)
    if all(type(element) is int and 0 <= element < 1 << 64 for element in whole.flat):
        return whole.astype(np.uint64)
    return array


def is_number(cell: str, whole: bool = False) -> bool:
    """Whether a cell is a number in CSV: an empty cell is a missing float, and Python's 1_000 is not a number."""
    if "_" in cell:
        return False
    try:
        if whole:
            int(cell)
        else:
            float(cell.strip() or "nan")
    except ValueError:
        return False
    return True
