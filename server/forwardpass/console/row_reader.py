"""Reads rows from .npy and .csv files a part at a time, so that a file of any length takes little memory. No network.

What is accepted, and what errors say, is as in `array_files`, which reads a file at once.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from forwardpass.client.arrays import TensorInfo
from forwardpass.console import csv_cells
from forwardpass.errors import ForwardpassError

READ_BYTES: Final = 1 << 20  # of a file at once
TEXT_LINES: Final = 4096


class NpyRows:
    """The rows of a .npy file. `rows` is their number."""

    def __init__(self, path: Path) -> None:
        """Raises ForwardpassError for a file that is none, or has no rows."""
        try:
            # Mapped only to have its header read and checked: mapped pages would count as the process's memory.
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise ForwardpassError(f"{path}: {error.strerror or error}") from None
        except (ValueError, EOFError) as error:
            raise ForwardpassError(f"{path}: {error}") from None
        if not isinstance(found, np.memmap) or not found.ndim:
            raise ForwardpassError(f"{path}: expected one array of rows")
        self._path = path
        self._mapped = None if found.flags.c_contiguous else found
        self._offset = int(found.offset)
        self._dtype = found.dtype
        self.rows: int | None = len(found)
        self.row_shape = found.shape[1:]

    def parts(self) -> Iterator[NDArray[Any]]:
        size = int(np.prod(self.row_shape, dtype=np.int64))
        step = max(1, READ_BYTES // max(1, size * self._dtype.itemsize))
        assert self.rows is not None
        if self._mapped is not None:  # in Fortran's order
            for start in range(0, self.rows, step):
                yield np.ascontiguousarray(self._mapped[start : start + step])
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for start in range(0, self.rows, step):
                count = min(step, self.rows - start)
                part = np.fromfile(file, self._dtype, count * size)
                if len(part) != count * size:
                    raise ForwardpassError(f"{self._path}: ends within row {start + len(part) // max(1, size)}")
                yield part.reshape(count, *self.row_shape)


class ArrayRows:
    """The rows of an array that is in memory."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self.rows: int | None = len(array)
        self.row_shape = array.shape[1:]

    def parts(self) -> Iterator[NDArray[Any]]:
        yield self._array


class CsvRows:
    """The rows of a CSV file for one input; `rows` is None: their number is not known before the end."""

    rows: int | None = None

    def __init__(self, path: Path, tensor: TensorInfo) -> None:
        """Reads the first part. Raises ForwardpassError."""
        self._path = path
        self._tensor = tensor
        self._reader = csv_cells.CsvCells(path, tensor)
        self._parts = self._read()
        try:
            self._first = next(self._parts)
        except StopIteration:
            raise ForwardpassError(f"{path}: has no rows") from None
        self.row_shape = self._first.shape[1:]

    def parts(self) -> Iterator[NDArray[Any]]:
        return itertools.chain((self._first,), self._parts)

    def _read(self) -> Iterator[NDArray[Any]]:
        try:
            if self._reader.text:  # whose cells may have line breaks
                with self._path.open(encoding="utf-8-sig", newline="") as lines:
                    numbered = enumerate(csv.reader(lines), 1)
                    while some := list(itertools.islice(numbered, TEXT_LINES)):
                        if len(rows := self._reader.rows(some)):
                            yield self._reader.shaped(rows)
                return
            with self._path.open("rb") as file:
                line = 1
                for block in _lines(file):
                    quick = self._quickly(block) if self._reader.columns else None
                    text = "" if quick is not None else block.decode("utf-8-sig" if line == 1 else "utf-8")
                    part = self._reader.parse(text, line) if quick is None else quick
                    line += block.count(b"\n")
                    if len(part):
                        yield self._reader.shaped(part)
        except OSError as error:
            raise ForwardpassError(f"{self._path}: {error.strerror or error}") from None
        except ValueError as error:
            raise ForwardpassError(f"{self._path}: {error}") from None

    def _quickly(self, block: bytes) -> NDArray[Any] | None:
        """Lines of plain numbers, read as JSON, which takes a fifth of the time; None: there is something else."""
        body = block.strip(b"\r\n").replace(b"\r\n", b"\n").replace(b"\n", b"],[")
        try:
            rows = np.array(orjson.loads(b"[[" + body + b"]]"))
        except ValueError:
            return None
        if rows.ndim != 2 or rows.shape[1] != self._reader.columns or rows.dtype.kind not in "iuf":
            return None
        if self._reader.whole:
            return rows if rows.dtype.kind in "iu" else None
        return rows.astype(np.float64)


RowSource = NpyRows | CsvRows | ArrayRows


def chunks(parts: Iterable[NDArray[Any]], rows: int) -> Iterator[NDArray[Any]]:
    """The same rows in arrays of `rows` each, the last one of what is left."""
    waiting: list[NDArray[Any]] = []
    count = 0
    for part in parts:
        start = 0
        while count + len(part) - start >= rows:
            stop = start + rows - count
            waiting.append(part[start:stop])
            yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            waiting, count, start = [], 0, stop
        if start < len(part):
            waiting.append(part[start:])
            count += len(part) - start
    if waiting:
        yield np.concatenate(waiting)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """A file's bytes in pieces that end with a line. The first piece is the first line, which may be a header."""
    first = file.readline()
    if first:
        yield first
    kept = b""
    while data := file.read(READ_BYTES):
        stop = data.rfind(b"\n") + 1
        if not stop:
            kept += data
            continue
        yield kept + data[:stop]
        kept = data[stop:]
    if kept:
        yield kept
