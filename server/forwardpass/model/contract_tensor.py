"""One tensor of a contract: name, datatype, shape, and what its columns, classes and categories are called. No I/O."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from forwardpass.protocol import DATATYPES

# The protocol's datatypes that ONNX Runtime exchanges with numpy. BYTES travels as an array of Python strings.
DTYPES: dict[str, np.dtype[Any]] = {
    d.name: np.dtype(np.object_) if d.numpy is None else d.numpy for d in DATATYPES.values() if not d.as_bits
}


class ContractPart(BaseModel):
    """What every part of a contract is: immutable, of exactly these fields and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ContractTensor(ContractPart):
    """One input or output. `shape` has -1 for any size; axis 0 is the batch if the model is batchable.

    `labels`, if any, name the indices of the last axis, in order: an output's classes, an input's columns.
    `categories`, if any, are what the values 0, 1, ... of an input of integers stand for.
    """

    name: str = Field(min_length=1)
    datatype: str
    shape: list[int]
    labels: list[str] | None = None
    categories: list[str] | None = None

    @field_validator("datatype")
    @classmethod
    def _known(cls, datatype: str) -> str:
        if datatype not in DTYPES:
            raise ValueError(f"is {datatype!r}; expected one of {', '.join(DTYPES)}")
        return datatype

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if any(size < -1 for size in self.shape):
            raise ValueError(
                f"tensor {self.name!r} has shape {self.shape}; expected sizes of at least 0, or -1 for any"
            )
        if self.labels is not None:
            places = self.shape[-1] if self.shape else 0
            if places not in (-1, len(self.labels)):
                raise ValueError(
                    f"tensor {self.name!r} has {len(self.labels)} labels for {places} places of its last axis"
                )
        if self.categories is not None:
            if self.dtype.kind not in "iu":
                raise ValueError(f"tensor {self.name!r} has categories and is {self.datatype}; expected integers")
            if not self.categories or len(set(self.categories)) != len(self.categories):
                raise ValueError(f"tensor {self.name!r} has the categories {self.categories}; expected different ones")
        return self

    @model_serializer(mode="wrap")
    def _without_what_older_readers_refuse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.categories is None:
            del fields["categories"]
        return fields

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.datatype]
