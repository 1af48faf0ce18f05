"""The datatypes of the protocol: one row each, with every name it goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np


@dataclass(frozen=True, slots=True)
class Datatype:
    """One element type, by each name it goes by."""

    name: str  # on the wire: "FP32"
    numpy: np.dtype[Any] | None  # how raw bytes are read (little-endian); None: not of one size (BYTES)
    itemsize: int  # bytes an element in raw contents; 0 for BYTES, where each element says its own
    contents: str | None  # its field of InferTensorContents; None: it travels raw only
    ort: str  # ONNX Runtime's name of a tensor of it: "tensor(float)"
    config: str  # its value of inference.DataType: "TYPE_FP32"


def _datatype(name: str, numpy: str | None, contents: str | None, ort: str, config: str = "") -> Datatype:
    dtype = None if numpy is None else np.dtype(numpy)
    itemsize = 0 if dtype is None else dtype.itemsize
    return Datatype(name, dtype, itemsize, contents, f"tensor({ort})", config or f"TYPE_{name}")


# By wire name.
DATATYPES: Final[Mapping[str, Datatype]] = MappingProxyType(
    {
        datatype.name: datatype
        for datatype in (
            _datatype("BOOL", "?", "bool_contents", "bool"),
            _datatype("UINT8", "u1", "uint_contents", "uint8"),
            _datatype("UINT16", "<u2", "uint_contents", "uint16"),
            _datatype("UINT32", "<u4", "uint_contents", "uint32"),
            _datatype("UINT64", "<u8", "uint64_contents", "uint64"),
            _datatype("INT8", "i1", "int_contents", "int8"),
            _datatype("INT16", "<i2", "int_contents", "int16"),
            _datatype("INT32", "<i4", "int_contents", "int32"),
            _datatype("INT64", "<i8", "int64_contents", "int64"),
            _datatype("FP16", "<f2", None, "float16"),
            _datatype("FP32", "<f4", "fp32_contents", "float"),
            _datatype("FP64", "<f8", "fp64_contents", "double"),
            _datatype("BYTES", None, "bytes_contents", "string", "TYPE_STRING"),
            # numpy has no bfloat16: uint16 carries its bits. Rows of it can be cut and stacked, not computed with.
            _datatype("BF16", "<u2", None, "bfloat16"),
        )
    }
)

# By ONNX Runtime's name of the tensor type, and by value name of inference.DataType. A type that is missing here
# ("tensor(complex64)", "seq(tensor(float))") cannot cross the wire.
BY_ORT_TYPE: Final[Mapping[str, Datatype]] = MappingProxyType({d.ort: d for d in DATATYPES.values()})
BY_CONFIG_TYPE: Final[Mapping[str, Datatype]] = MappingProxyType({d.config: d for d in DATATYPES.values()})
