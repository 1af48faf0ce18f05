"""A model's inputs and outputs: its tensors, and whether axis 0 is the batch. Pure data, used by every stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from forwardpass.protocol import Datatype


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `shape` has -1 for any size, and includes the batch axis."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()  # of the indices of the last axis, if known
    categories: tuple[str, ...] = ()  # of the values 0, 1, ... of an input of integers, if known
    network_shape: tuple[int, ...] | None = None  # the network's, where clients are shown another


@dataclass(frozen=True)
class ModelSignature:
    """Inputs and outputs in the model's own order.

    `batchable`: axis 0 of every input and output is of any size, so that requests could be rows of one matrix. Whether
    their outputs would be the same is determined separately, at load.
    `hidden`: names of outputs that are computed only if requested.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batchable: bool
    hidden: frozenset[str] = frozenset()
    defaulted: frozenset[str] = frozenset()  # further inputs, which have a default in the file and cannot be sent
    unsendable: tuple[tuple[str, str], ...] = ()  # outputs of types that the protocol has not, with those types

    @cached_property
    def default_outputs(self) -> tuple[int, ...]:
        """Indices of the outputs for a request that names none."""
        return tuple(i for i, t in enumerate(self.outputs) if t.name not in self.hidden)

    @cached_property
    def input_place(self) -> dict[str, int]:
        return {t.name: i for i, t in enumerate(self.inputs)}

    @cached_property
    def output_place(self) -> dict[str, int]:
        return {t.name: i for i, t in enumerate(self.outputs)}

    @property
    def one_row_bytes(self) -> int | None:
        """Bytes of one row of the only input, if there is one input of fixed row size; else None."""
        if len(self.inputs) != 1 or not self.batchable:
            return None
        tensor = self.inputs[0]
        size = tensor.datatype.itemsize
        for dimension in tensor.shape[1:]:
            if dimension < 0:
                return None
            size *= dimension
        return size or None
