"""Read and write arrays for the commands: .npy, .npz, .csv and .json. No network; of a model, only its tensors.

A CSV file is one array [rows, columns]; where numbers are expected, a first line with a non-numeric cell is skipped as
a header. A JSON file holds nested lists, or an object of them by input name. Errors name the file and the position in
it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.client.arrays import TensorInfo
from forwardpass.console.csv_cells import exact
from forwardpass.console.row_reader import CsvRows
from forwardpass.errors import ForwardpassError

READ = (".npy", ".npz", ".csv", ".json")
WRITTEN = (".npy", ".npz", ".csv", ".json")

Arrays = dict[str, NDArray[Any]]


def read(path: Path, stdin: io.TextIOBase | Any, tensors: Sequence[TensorInfo]) -> Arrays:
    """The arrays in a file, by input name; `-` reads JSON from `stdin`.

    `tensors` are all inputs that the file may contain; an array without a name is taken for the only one. The dtypes
    are those of the file, not yet the model's.
    """
    try:
        if str(path) == "-":
            return _named(_json(stdin.read(), "stdin"), "stdin", tensors)
        match path.suffix.lower():
            case ".npy":
                return _named(np.load(path, allow_pickle=False), path, tensors)
            case ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    return _named({name: arrays[name] for name in arrays.files}, path, tensors)
            case ".json":
                return _named(_json(path.read_text("utf-8"), path), path, tensors)
            case ".csv":
                tensor = _only(path, tensors)
                return {tensor.name: _csv(path, tensor)}
            case suffix:
                raise ForwardpassError(f"{path}: cannot read '{suffix}' files; expected one of {', '.join(READ)}")
    except OSError as error:
        raise ForwardpassError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise ForwardpassError(f"{path}: {error}") from None


def save(path: Path, outputs: Mapping[str, NDArray[Any]], labels: Mapping[str, Sequence[str]]) -> None:
    """Write outputs in the format given by the file's suffix; .npy and .csv hold one output.

    CSV has a header, `<output>_<label or place>`, and each number with enough digits to restore it exactly.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITTEN:
        raise ForwardpassError(f"{path}: cannot write '{suffix}' files; expected one of {', '.join(WRITTEN)}")
    if suffix in (".npy", ".csv") and len(outputs) != 1:
        raise ForwardpassError(
            f"{path}: holds one output, got {', '.join(outputs)}; choose one, or save as .npz or .json"
        )
    try:
        if suffix == ".json":
            path.write_text(json.dumps({name: plain(array) for name, array in outputs.items()}) + "\n", "utf-8")
        elif suffix == ".npz":
            # As np.savez, but for outputs of any name: np.savez takes some names as its own arguments.
            with zipfile.ZipFile(path, "w") as archive:
                for name, array in outputs.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, _without_objects(array), allow_pickle=False)
        else:
            ((name, array),) = outputs.items()
            if suffix == ".npy":
                np.save(path, _without_objects(array))
            else:
                _write_csv(path, name, array, labels.get(name, ()))
    except OSError as error:
        raise ForwardpassError(f"{path}: {error.strerror or error}") from None


def plain(array: NDArray[Any]) -> Any:
    """Nested lists for JSON; non-finite numbers become the string NaN, Infinity or -Infinity, bytes latin-1 text."""
    if array.dtype.kind == "f":
        # Through text: the shortest digits that restore the number in its own width, not in double's.
        flat: list[Any] = [float(str(value)) for value in array.ravel()]
        flat = [value if math.isfinite(value) else _word(value) for value in flat]
    else:
        flat = [value.decode("latin-1") if isinstance(value, bytes) else value for value in array.ravel().tolist()]
    filled = np.empty(len(flat), object)
    filled[:] = flat
    return filled.reshape(array.shape).tolist()


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _only(path: Path | str, tensors: Sequence[TensorInfo]) -> TensorInfo:
    if len(tensors) != 1:
        names = ", ".join(tensor.name for tensor in tensors)
        raise ForwardpassError(f"{path}: the model has the inputs {names}: choose one by NAME={path}")
    return tensors[0]


def _named(content: Any, path: Path | str, tensors: Sequence[TensorInfo]) -> Arrays:
    if not isinstance(content, dict):
        return {_only(path, tensors).name: _rectangular(content, path)}
    known = {tensor.name for tensor in tensors}
    if len(tensors) == 1 and content.keys() == {"arr_0"}:
        # The name that numpy.savez gives an unnamed array.
        return {tensors[0].name: _rectangular(content["arr_0"], path)}
    for name in content:
        if name not in known:
            raise ForwardpassError(f"{path}: has '{name}'; expected {', '.join(sorted(known))}")
    return {name: _rectangular(value, f"{path}: {name}") for name, value in content.items()}


def _rectangular(value: Any, where: Path | str) -> NDArray[Any]:
    try:
        array = exact(value)
    except ValueError:
        raise ForwardpassError(f"{where}: its rows differ in length") from None
    if array.dtype.kind not in "biufUS":
        raise ForwardpassError(f"{where}: expected numbers or texts in nested lists, got {array.dtype}")
    return array


def _json(text: str, where: Path | str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ForwardpassError(f"{where}: is not JSON: {error}") from None


def _csv(path: Path, tensor: TensorInfo) -> NDArray[Any]:
    parts = list(CsvRows(path, tensor).parts())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _without_objects(array: NDArray[Any]) -> NDArray[Any]:
    """Strings as numpy's fixed-width type: an object array could only be pickled."""
    if array.dtype != object:
        return array
    return array.astype(bytes if any(isinstance(value, bytes) for value in array.flat) else str)


def _write_csv(path: Path, name: str, array: NDArray[Any], labels: Sequence[str]) -> None:
    rows = array.reshape(len(array) if array.ndim else 1, -1) if array.size else array.reshape(0, 0)
    header = [f"{name}_{labels[place] if place < len(labels) else place}" for place in range(rows.shape[1])]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([str(value) for value in row] for row in rows)
