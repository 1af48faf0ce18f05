"""Writes rows to .npy and .csv files as they come, in little memory. No network.

A file is written beside its place, as FILE.partial, and moved there once it is complete; after an error it stays, with
the rows that came before.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from forwardpass.errors import ForwardpassError

HEADER_BYTES: Final = 256  # of a .npy file: of one size, since it is written again when all rows are there


class RowFormat(Protocol):
    """A file's content. `begin` is called before the first rows, and `end` when there are no more."""

    def begin(self, file: io.BufferedWriter, rows: NDArray[Any]) -> None: ...
    def write(self, file: io.BufferedWriter, rows: NDArray[Any]) -> None: ...
    def end(self, file: io.BufferedWriter, count: int) -> None: ...


class NpyFormat:
    """One array in numpy's format, version 1.0."""

    def begin(self, file: io.BufferedWriter, rows: NDArray[Any]) -> None:
        if rows.dtype.kind not in "biuf":
            raise ForwardpassError("texts have no fixed size, which a .npy file written row by row needs: save as .csv")
        self._dtype, self._row_shape = rows.dtype, rows.shape[1:]
        file.write(self._header(0))

    def write(self, file: io.BufferedWriter, rows: NDArray[Any]) -> None:
        if rows.shape[1:] != self._row_shape or rows.dtype != self._dtype:
            raise ForwardpassError(f"rows of {list(rows.shape[1:])} after rows of {list(self._row_shape)}")
        file.write(np.ascontiguousarray(rows).data)

    def end(self, file: io.BufferedWriter, count: int) -> None:
        file.seek(0)
        file.write(self._header(count))

    def _header(self, rows: int) -> bytes:
        described = {"descr": self._dtype.str, "fortran_order": False, "shape": (rows, *self._row_shape)}
        text = repr(described).encode("latin-1")
        size = HEADER_BYTES - 10
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1) + b"\n"


class CsvFormat:
    """A header, `<output>_<label or place>`, and each number with enough digits to restore it exactly."""

    def __init__(self, output: str, labels: Sequence[str] = ()) -> None:
        self._output, self._labels = output, labels

    def begin(self, file: io.BufferedWriter, rows: NDArray[Any]) -> None:
        width = _flat(rows).shape[1]
        names = [self._labels[i] if i < len(self._labels) else i for i in range(width)]
        file.write(_lines([[f"{self._output}_{name}" for name in names]]))

    def write(self, file: io.BufferedWriter, rows: NDArray[Any]) -> None:
        flat = _flat(rows)
        if flat.dtype in (np.float32, np.float64, np.int64, np.int32) and flat.size and np.isfinite(flat).all():
            text = orjson.dumps(np.ascontiguousarray(flat), option=orjson.OPT_SERIALIZE_NUMPY)
            file.write(text[2:-2].replace(b"],[", b"\n") + b"\n")
        else:
            file.write(_lines([[str(value) for value in row] for row in flat]))

    def end(self, file: io.BufferedWriter, count: int) -> None:
        pass


class RowWriter:
    """One file, written within the context. Leaving it without an error moves the file to its place."""

    def __init__(self, path: Path, how: RowFormat) -> None:
        self._path = path
        self.partial = path.with_name(path.name + ".partial")
        self._how = how
        self._file: io.BufferedWriter | None = None
        self.count = 0  # rows written
        self.row_shape: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        try:
            self._file = self.partial.open("wb")
        except OSError as error:
            raise ForwardpassError(f"{self.partial}: {error.strerror or error}") from None
        return self

    def write(self, rows: NDArray[Any]) -> None:
        """Raises ForwardpassError."""
        assert self._file is not None
        try:
            if not self.count:
                self._how.begin(self._file, rows)
                self.row_shape = rows.shape[1:]
            self._how.write(self._file, rows)
        except OSError as error:
            raise ForwardpassError(f"{self.partial}: {error.strerror or error}") from None
        self.count += len(rows)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        assert self._file is not None
        with self._file as file:
            if self.count:
                self._how.end(file, self.count)
        if kind is None:
            self.partial.replace(self._path)
        elif not self.count:
            self.partial.unlink()


def _flat(rows: NDArray[Any]) -> NDArray[Any]:
    return rows.reshape(len(rows), -1)


def _lines(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
