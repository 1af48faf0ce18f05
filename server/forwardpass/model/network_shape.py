"""The shape of a network: a digest of its ONNX file without the weights. Networks of one shape take as long to run.

In it are operators, attributes, names of tensors, declared shapes, and the values of all constants that are whole
numbers, text or of unusual types, since these may be sizes, axes or indices. Left out are the values of floating-point
tensors and of 8-bit integers, which are weights, and what is written about the file: names of graphs, documentation,
metadata. Whether rows are independent does not follow from it, since that may depend on weights.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from pathlib import Path
from typing import Final

from forwardpass.model.onnx_file import DEEPEST, Buffer, fields

# TensorProto.DataType of weights: FLOAT, UINT8, INT8, FLOAT16, DOUBLE, BFLOAT16, the FLOAT8s, UINT4, INT4.
_WEIGHTS: Final = frozenset({1, 2, 3, 10, 11, 16, 17, 18, 19, 20, 21, 22})
_VALUES: Final = frozenset({4, 5, 6, 7, 9, 10, 11, 13})  # TensorProto's fields that have values, or where they are
_EXTERNAL: Final = 13

# By kind of message: the fields that are messages, by their kind; and those that are only written about it.
_TENSOR: Final = "tensor"
_INSIDE: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
}
_ABOUT: Final[dict[str, frozenset[int]]] = {
    "model": frozenset({2, 3, 4, 5, 6, 14}),  # producer, its version, domain, model_version, doc_string, metadata_props
    "graph": frozenset({2, 10, 16}),
    "function": frozenset({8, 14}),
    "node": frozenset({6, 9}),
    "attribute": frozenset({13}),
    _TENSOR: frozenset({12, 16}),
    "sparse": frozenset(),
}


def network_shape(path: Path) -> bytes | None:
    """The digest; None where the file cannot be read, or keeps other values than weights in files beside it."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return digest.digest() if _message(digest, data, (0, len(data)), "model", 0) else None
    except (OSError, ValueError, IndexError, struct.error):
        return None


def _message(digest: hashlib._Hash, data: Buffer, span: tuple[int, int], kind: str, depth: int) -> bool:
    """Add a message to the digest. Returns whether all of it that matters is in the file."""
    if depth > DEEPEST:
        return False
    inside, about = _INSIDE.get(kind, {}), _ABOUT[kind]
    leave_out = _VALUES if kind == _TENSOR and _is_weight(data, span) else frozenset()
    for number, value, start, stop in fields(data, *span):
        if number in about or number in leave_out:
            continue
        if kind == _TENSOR and number == _EXTERNAL:
            return False
        within = inside.get(number)
        if within is None:
            # The length goes first, so that no two messages are told by the same bytes.
            digest.update(b"%d:%d:%d " % (number, value, stop - start))
            digest.update(data[start:stop])
            continue
        digest.update(b"%d{" % number)
        if not _message(digest, data, (start, stop), within, depth + 1):
            return False
        digest.update(b"}")
    return True


def _is_weight(data: Buffer, span: tuple[int, int]) -> bool:
    return any(number == 2 and value in _WEIGHTS for number, value, _, _ in fields(data, *span))
