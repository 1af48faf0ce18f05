"""What a model takes and gives: its tensors, and whether axis 0 is the batch. Pure data, read by every station."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from forwardpass.protocol import Datatype


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `shape` has -1 where any size goes, and includes the batch axis."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()  # of the places of the last axis, where they are known


@dataclass(frozen=True)
class ModelSignature:
    """Inputs and outputs in the model's own order.

    `batchable`: axis 0 of every input and output is of any size, so that requests could be rows of one matrix. Whether
    their answers would be the same is another question, which the probe at load answers.
    `hidden`: names of outputs that are computed only for those who ask for them.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batchable: bool
    hidden: frozenset[str] = frozenset()

    @cached_property
    def default_outputs(self) -> tuple[int, ...]:
        """Places of the outputs of a request that names none."""
        return tuple(i for i, t in enumerate(self.outputs) if t.name not in self.hidden)

    @cached_property
    def input_place(self) -> dict[str, int]:
        return {t.name: i for i, t in enumerate(self.inputs)}

    @cached_property
    def output_place(self) -> dict[str, int]:
        return {t.name: i for i, t in enumerate(self.outputs)}

    @property
    def one_row_bytes(self) -> int | None:
        """Bytes of one row of the only input, where there is one input of fixed row size; None otherwise."""
        if len(self.inputs) != 1 or not self.batchable:
            return None
        tensor = self.inputs[0]
        size = tensor.datatype.itemsize
        for dimension in tensor.shape[1:]:
            if dimension < 0:
                return None
            size *= dimension
        return size or None
