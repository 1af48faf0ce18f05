"""Files that an ONNX file keeps its weights in, and whether they lie where they may: in the model's folder.

A model is somebody else's file: one that names `../../secret` or `/etc/passwd` as its weights must not be opened. The
names are read by walking the protobuf's fields; tensors' bytes are skipped, so that it costs nothing for large files.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from forwardpass.errors import ModelError, printable
from forwardpass.model.onnx_file import DEEPEST, fields

# Field numbers of onnx.proto, by message: which of its fields hold messages that lead to a tensor.
_MODEL = {7: "graph", 20: "training", 25: "function"}
_FIELDS = {
    "model": _MODEL,
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # of a StringStringEntryProto


def check(path: Path, model_folder: Path) -> None:
    """Raise ModelError where the ONNX file `path` names weights that are not files in the folder `home`.

    Links may lead about within `home`, as they do in a mounted Kubernetes volume, but not out of it.
    """
    inside = model_folder.resolve()
    for location in sorted(locations(path)):
        shown = printable(location, 200)
        parts = PurePosixPath(location.replace("\\", "/"))
        if not location or "\0" in location or parts.is_absolute() or ".." in parts.parts:
            raise ModelError(f"{path.name} names '{shown}' as a file of weights; expected one in its folder")
        file = path.parent / location
        try:
            found = file.resolve(strict=True)
        except (OSError, RuntimeError):
            raise ModelError(f"{path.name} has weights in '{shown}', which is not there") from None
        if not found.is_relative_to(inside):
            raise ModelError(f"{path.name} has weights in '{shown}', a link out of the model's folder")
        if not found.is_file():
            raise ModelError(f"{path.name} has weights in '{shown}', which is not a file")


def locations(path: Path) -> set[str]:
    """The paths of external data that an ONNX file names, as it names them. Raises ModelError where it is no ONNX."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise ModelError(f"{path.name} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return set(_locations(data, 0, len(data), "model", 0))
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError):
        raise ModelError(f"{path.name} is not an ONNX file, or was cut short") from None


def _locations(data: mmap.mmap, at: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > DEEPEST:
        raise ValueError("messages too deep")
    known = _FIELDS[message]
    for entry in fields(data, at, end):
        inner = known.get(entry.number) if entry.stop else None
        if inner == "entry":
            pairs = {f.number: data[f.start : f.stop] for f in fields(data, entry.start, entry.stop)}
            if pairs.get(_KEY) == b"location":
                yield pairs.get(_VALUE, b"").decode("utf-8", "surrogateescape")
        elif inner is not None:
            yield from _locations(data, entry.start, entry.stop, inner, depth + 1)
