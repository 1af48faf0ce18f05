"""Tables to a model's inputs: each column goes to the input, or to the place in an input, that has its name. Pure.

A table is a data frame of pandas, Polars or PyArrow (found by its interface: none of them is imported), a mapping of
its columns, or records: a sequence of mappings. Numpy arrays by input name are no table: they are sent as they are.

- The order of columns does not matter. One that lacks, and one that no input takes, is an error.
- Every cell has a value: a network makes of NaN whatever it happens to. To send NaN on purpose, send an array.
- Words become the codes of an input with categories; numbers never become text, nor text numbers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forwardpass import protocol
from forwardpass.client.arrays import TensorInfo, fit
from forwardpass.client.errors import InvalidArgument

Columns = Mapping[str, Any]

_SHOWN: Final = 8  # names in an error
_NO_VALUE: Final = frozenset({"NoneType", "NAType", "NaTType"})  # types of what stands for a missing value


def is_array(value: object) -> TypeGuard[ArrayLike]:
    """Whether `value` is an array, or nested lists: neither a table nor arrays by name."""
    return type(value) is np.ndarray or not (isinstance(value, Mapping) or is_table(value))


def is_table(value: object) -> bool:
    """Whether `value` is a data frame, or records. Mappings are looked at by `columns_in`, which knows the inputs."""
    if isinstance(value, np.ndarray | Mapping | str | bytes):
        return False
    kind = type(value)
    if hasattr(kind, "collect") and hasattr(kind, "collect_schema"):
        raise InvalidArgument(f"expected a table, got a {kind.__name__}, which has no values yet: call its collect()")
    if hasattr(kind, "column_names") and hasattr(kind, "column"):
        return True
    if hasattr(kind, "columns") and hasattr(kind, "__getitem__") and hasattr(kind, "__len__"):
        return True
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def columns_in(value: Any, inputs: Sequence[TensorInfo]) -> Columns | None:
    """The columns of a table, by name; None: `value` is none, but an array or arrays by input name.

    A mapping is a table if a value is a column of a data frame, or if its keys are columns rather than inputs; a
    mapping of single values is a table of one row.
    """
    if isinstance(value, Mapping):
        names = {tensor.name for tensor in inputs}
        of_a_frame = any(hasattr(column, "to_numpy") for column in value.values())
        if value and all(isinstance(cell, str | bytes) or np.ndim(cell) == 0 for cell in value.values()):
            one_row = all(tensor.shape for tensor in inputs)
            return {str(name): [cell] for name, cell in value.items()} if one_row else None
        if not of_a_frame and not (value.keys() - names and value.keys() & set(expected_columns(inputs)) - names):
            return None
        return {str(name): column for name, column in value.items()}
    if not is_table(value):
        return None
    kind = type(value)
    if hasattr(kind, "column_names"):
        return _unique(value.column_names, value.column)
    if hasattr(kind, "columns"):
        return _unique(list(value.columns), value.__getitem__)
    return _of_records(value)


def _unique(names: Sequence[Any], column: Any) -> Columns:
    twice = sorted({str(name) for name in names if list(names).count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise InvalidArgument(f"expected columns of different names, got {_named(twice)} more than once")
    return {str(name): column(name) for name in names}


def _of_records(records: Sequence[Mapping[Any, Any]]) -> Columns:
    """Columns by the keys of the first record; a later one without a key has no value there."""
    for row, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise InvalidArgument(f"row {row}: expected a record of values by column, got {type(record).__name__}")
        if extra := sorted(str(key) for key in record.keys() - records[0].keys()):
            raise InvalidArgument(f"row {row}: has {_named(extra)}, which row 0 has not")
    return {str(name): [record.get(name) for record in records] for name in records[0]}


def expected_columns(inputs: Sequence[TensorInfo]) -> list[str]:
    """The columns of a table for these inputs: an input's own name, or those of the columns that it is made of."""
    return list(dict.fromkeys(name for tensor in inputs for name in _columns(tensor)))


def _columns(tensor: TensorInfo) -> tuple[str, ...]:
    return tensor.labels or (tensor.name,)


def is_text(column: str, inputs: Sequence[TensorInfo]) -> bool:
    """Whether cells of this column are words: of a text, or of categories."""
    return any(tensor.datatype == "BYTES" or bool(tensor.categories) for tensor in inputs if column in _columns(tensor))


def arrays_of(columns: Columns, model: str, inputs: Sequence[TensorInfo]) -> dict[str, NDArray[Any]]:
    """The inputs that a table makes, [rows, ...] each in the dtype of its input.

    Raises InvalidArgument naming the column, and the row (from 0) of a cell that cannot be sent.
    """
    if _in_order(columns, inputs):
        inputs = [_with_columns(inputs[0], tuple(columns))]
    _check_names(columns, model, inputs)
    filled = {name: _values(columns[name], name) for name in expected_columns(inputs)}
    rows = {name: len(array) for name, array in filled.items()}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"'{name}' {count}" for name, count in list(rows.items())[:_SHOWN])
        raise InvalidArgument(f"expected columns of as many rows, got {told}")
    if not all(rows.values()):
        raise InvalidArgument("expected a table with rows, got one without")
    return {tensor.name: _tensor(tensor, filled) for tensor in inputs}


def _in_order(columns: Columns, inputs: Sequence[TensorInfo]) -> bool:
    """Whether a model has one input of values whose columns have no names: a table's then count in their order."""
    if len(inputs) != 1 or inputs[0].labels or inputs[0].name in columns or len(inputs[0].shape) != 2:
        return False
    return inputs[0].shape[1] in (-1, len(columns))


def _with_columns(tensor: TensorInfo, names: tuple[str, ...]) -> TensorInfo:
    return TensorInfo(tensor.name, tensor.datatype, tensor.shape, names, tensor.categories)


def _check_names(columns: Columns, model: str, inputs: Sequence[TensorInfo]) -> None:
    expected = expected_columns(inputs)
    missing = [name for name in expected if name not in columns]
    extra = [name for name in columns if name not in expected]
    if not missing and not extra:
        return
    if missing:
        by_case = {name.strip().casefold(): name for name in extra}
        near = {
            name: by_case.get(name.strip().casefold()) or next(iter(difflib.get_close_matches(name, extra, 1)), None)
            for name in missing
        }
        hints = [f"is '{other}' meant by '{name}'?" for name, other in near.items() if other]
        told = f"the table has no {_named(missing)}"
        told += f", and has {_named(extra)}" if extra else ""
        told += f"; {hints[0]}" if hints else ""
    else:
        told = f"the table has {_named(extra)} too: leave out what the model does not take"
    raise InvalidArgument(f"model '{model}' takes the columns {_named(expected)}; {told}")


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more


def _tensor(tensor: TensorInfo, filled: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    names = _columns(tensor)
    arrays = [_fitted(filled[name], name, tensor) for name in names]
    if tensor.labels:
        flat = next((n for n, array in zip(names, arrays, strict=True) if array.ndim != 1), None)
        if flat is not None:
            raise InvalidArgument(f"column '{flat}': expected one value in a cell, got a list")
        return np.stack(arrays, axis=1)
    (array,) = arrays
    sizes = tensor.shape[1:]
    if array.ndim == 1:
        if any(size not in (-1, 1) for size in sizes):
            raise InvalidArgument(
                f"column '{tensor.name}': expected lists of shape {tensor.sizes} without the first axis, got one value "
                "in a cell: send an array, or export the model with the names of the columns (labels)"
            )
        return array.reshape(len(array), *(1 for _ in sizes))
    return array


def _fitted(array: NDArray[Any], name: str, tensor: TensorInfo) -> NDArray[Any]:
    """A column's values in the dtype of its input."""
    column = TensorInfo(name, tensor.datatype, tensor.shape)
    datatype = protocol.DATATYPES.get(tensor.datatype)
    if tensor.categories:
        return coded(array, tensor, f"column '{name}'")
    if datatype is not None and datatype.numpy is None and array.dtype.kind not in "OUS":
        raise InvalidArgument(
            f"column '{name}': expected text (BYTES), got {array.dtype}, as {array.flat[0]} in row 0: make it text, as "
            "by astype(str), where that is how the model was trained"
        )
    if datatype is not None and datatype.numpy is not None and array.dtype.kind in "OUS":
        raise InvalidArgument(
            f"column '{name}': expected numbers ({tensor.datatype}), got text, {array.flat[0]!r} in row 0: convert it "
            "as before the training"
        )
    if array.dtype.kind in "Mm":
        raise InvalidArgument(f"column '{name}': expected {tensor.datatype}, got {array.dtype}: convert it to a number")
    return fit(array, column, "column")


def coded(array: NDArray[Any], tensor: TensorInfo, where: str) -> NDArray[Any]:
    """The codes of words, or of numbers where all categories are whole numbers. Raises InvalidArgument for others."""
    codes = {word: code for code, word in enumerate(tensor.categories)}
    numbered = all(word.lstrip("-").isdecimal() for word in tensor.categories)
    if array.dtype.kind not in "OUS" and not (numbered and array.dtype.kind in "iuf") and array.dtype.kind != "b":
        raise InvalidArgument(
            f"{where}: expected one of the words {_named(tensor.categories)}, got {array.dtype}: send words; codes are "
            "sent as a numpy array by the input's name"
        )
    cells = array.ravel().tolist()
    code_of = {cell: codes.get(_word(cell), -1) for cell in set(cells)}
    found = [code_of[cell] for cell in cells]
    if -1 in found:
        row = found.index(-1)
        got = _word(cells[row])
        near = difflib.get_close_matches(got, tensor.categories, 1)
        hint = f"; is '{near[0]}' meant?" if near else ""
        raise InvalidArgument(f"{where}, row {row}: expected one of {_named(tensor.categories)}, got '{got}'{hint}")
    return np.array(found, protocol.DATATYPES[tensor.datatype].numpy).reshape(array.shape)


def _word(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _values(column: Any, name: str) -> NDArray[Any]:
    """A column as an array of numbers, booleans or texts (objects), [rows] or, of lists, [rows, ...]."""
    try:
        array = np.asarray(column)
    except ValueError:  # lists of different lengths
        array = np.empty(len(column), object)
        array[:] = list(column)
    if array.ndim == 0:
        raise InvalidArgument(f"column '{name}': expected a value for each row, got one value")
    if array.dtype.kind == "f" and (missing := np.isnan(array)).any():
        raise _no_value(name, int(np.argwhere(missing)[0, 0]), "NaN")
    if array.dtype.kind != "O":
        return array.astype(object) if array.dtype.kind in "US" else array
    cells = array.tolist()
    for row, cell in enumerate(cells):
        if type(cell).__name__ in _NO_VALUE or (isinstance(cell, float) and math.isnan(cell)):
            raise _no_value(name, row, str(cell))
    if all(isinstance(cell, str | bytes) for cell in cells):
        return array
    return _of_objects(cells, name)


def _no_value(name: str, row: int, got: str) -> InvalidArgument:
    return InvalidArgument(
        f"column '{name}', row {row}: expected a value, got {got}: fill or leave out rows without one, as in the "
        "training; NaN on purpose is sent in a numpy array by the input's name"
    )


def _of_objects(cells: list[Any], name: str) -> NDArray[Any]:
    odd = next((row for row, cell in enumerate(cells) if isinstance(cell, str | bytes)), None)
    if odd is not None:
        other = next(row for row, cell in enumerate(cells) if not isinstance(cell, str | bytes))
        raise InvalidArgument(
            f"column '{name}': expected numbers or text, got both: {cells[odd]!r} in row {odd}, "
            f"{cells[other]!r} in row {other}"
        )
    try:
        array = np.array([cell if isinstance(cell, bool | int | float) else np.asarray(cell) for cell in cells])
        return array.astype(np.float64) if array.dtype.kind == "O" else array
    except (ValueError, TypeError):
        raise InvalidArgument(
            f"column '{name}': expected numbers, text, or lists of the same length, got {type(cells[0]).__name__}"
        ) from None
