"""The datatypes of the protocol: one row each, with all their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Datatype:
    """One element type: its names, and the facts needed to compute with it."""

    name: str  # on the wire: "FP32"
    numpy: np.dtype[Any] | None  # dtype of raw bytes (little-endian); None: variable size (BYTES)
    itemsize: int  # bytes per element in raw contents; 0 for BYTES, where each element has its own length
    contents: str | None  # its field of InferTensorContents; None: raw contents only
    ort: str  # ONNX Runtime's name of its tensor type: "tensor(float)"
    config: str  # its value of inference.DataType: "TYPE_FP32"
    as_bits: int  # ONNX's element type number if numpy lacks the type and carries its bits; 0: numpy has it
    rounding: float | None  # error from reordered sums, relative to the largest value; None: exact

    def widened(self, array: NDArray[Any]) -> NDArray[Any]:
        """The values of an array of this type, in a type that numpy can compute with."""
        return (array.astype(np.uint32) << 16).view(np.float32) if self.as_bits else array

    def narrowed(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Values as an array of this type, which must be floating-point; for BF16 the low bits are cut off."""
        assert self.numpy is not None and self.rounding is not None
        return (values.view(np.uint32) >> 16).astype(self.numpy) if self.as_bits else values.astype(self.numpy)


def _datatype(
    name: str,
    numpy: str | None,
    contents: str | None,
    ort: str,
    *,
    config: str = "",
    as_bits: int = 0,
    rounding: float | None = None,
) -> Datatype:
    dtype = None if numpy is None else np.dtype(numpy)
    itemsize = 0 if dtype is None else dtype.itemsize
    return Datatype(name, dtype, itemsize, contents, f"tensor({ort})", config or f"TYPE_{name}", as_bits, rounding)


# By name on the wire.
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
            _datatype("FP16", "<f2", None, "float16", rounding=5e-3),
            _datatype("FP32", "<f4", "fp32_contents", "float", rounding=1e-5),
            _datatype("FP64", "<f8", "fp64_contents", "double", rounding=1e-12),
            _datatype("BYTES", None, "bytes_contents", "string", config="TYPE_STRING"),
            # numpy has no bfloat16: uint16 carries its bits. Its rows can be cut and stacked, but not computed with.
            _datatype("BF16", "<u2", None, "bfloat16", as_bits=16, rounding=4e-2),
        )
    }
)

# By ONNX Runtime's name of the tensor type, and by value name of inference.DataType. A type that is missing here
# ("tensor(complex64)", "seq(tensor(float))") cannot cross the wire.
BY_ORT_TYPE: Final[Mapping[str, Datatype]] = MappingProxyType({d.ort: d for d in DATATYPES.values()})
BY_CONFIG_TYPE: Final[Mapping[str, Datatype]] = MappingProxyType({d.config: d for d in DATATYPES.values()})
