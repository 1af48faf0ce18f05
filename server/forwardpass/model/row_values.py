"""What is known of a tensor when rows are followed through a graph: where its rows lie, and what it depends on. Pure.

Rows lie along one axis, whose size is outer x B x block: a batch [B, T, C] that is reshaped to [B*T, C] has axis 0 and
block T, one [T, B, C] that is reshaped to [T*B, C] has axis 0 and outer T.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

Dims = tuple[int | None, ...]


class RowCount(NamedTuple):
    """So many times the number of rows, as an entry of a shape."""

    times: int


Entry = int | RowCount | None  # of a vector of sizes; None: not known


class Dependence(enum.Enum):
    """What a tensor depends on.

    MIXED is claimed of sums, orders and comparisons over rows alone. What depends on a row's place, or on how many rows
    there are, is UNKNOWN: a network may well take it back, as one does that picks an element of each row by number.
    """

    CONSTANT = "constant"  # on no input
    ROWS = "rows"  # each row on its own row of the inputs, and on no other
    SIZES = "sizes"  # on how many rows there are, as a shape does
    MIXED = "mixed"  # on several rows
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor. `dims`: its sizes, None for those that are not known or are the rows'; None: not even how many."""

    kind: Dependence
    dims: Dims | None = None
    axis: int = 0  # of the rows
    block: int = 1  # elements along it, side by side, that belong to one row
    outer: int = 1  # how often all rows come along it
    entries: tuple[Entry, ...] | None = None  # of a short vector (or scalar) of integers
    lead: float | None = None  # its first element, of a short constant of floats
    why: str = ""  # of MIXED and UNKNOWN: the node, and what it does

    @property
    def rank(self) -> int | None:
        return None if self.dims is None else len(self.dims)

    @property
    def layout(self) -> tuple[int, int]:
        """How the rows lie along their axis."""
        return self.outer, self.block

    @property
    def plain(self) -> bool:
        """Whether axis 0 has one element for each row."""
        return (self.axis, self.block, self.outer) == (0, 1, 1)

    @property
    def integers(self) -> tuple[int, ...] | None:
        """Its elements, where all are known and none depends on the rows."""
        if self.entries is None or not all(isinstance(entry, int) for entry in self.entries):
            return None
        return tuple(entry for entry in self.entries if isinstance(entry, int))

    def shaped(self, dims: Dims | None, axis: int | None = None) -> Value:
        """The same dependence with another shape."""
        return replace(self, dims=dims, axis=self.axis if axis is None else axis, entries=None, lead=None)


UNKNOWN = Value(Dependence.UNKNOWN)


def constant(dims: Dims | None = None, entries: Sequence[Entry] | None = None) -> Value:
    return Value(Dependence.CONSTANT, dims, entries=None if entries is None else tuple(entries))


def rows(dims: Dims, axis: int = 0, block: int = 1) -> Value:
    return Value(
        Dependence.ROWS, tuple(None if place == axis else size for place, size in enumerate(dims)), axis, block
    )


def sizes(entries: Sequence[Entry], dims: Dims | None = None) -> Value:
    """A vector of sizes; a constant where none depends on the rows."""
    shape = (len(entries),) if dims is None else dims
    kind = Dependence.SIZES if any(isinstance(entry, RowCount) for entry in entries) else Dependence.CONSTANT
    return Value(kind, shape, entries=tuple(entries))


def mixed(why: str) -> Value:
    return Value(Dependence.MIXED, why=why)


def unknown(why: str) -> Value:
    return Value(Dependence.UNKNOWN, why=why)


def worst(values: Sequence[Value]) -> Value | None:
    """The first that is mixed, else the first that is unknown; None: rows can be followed through all."""
    for kind in (Dependence.MIXED, Dependence.UNKNOWN):
        for value in values:
            if value.kind is kind:
                return value
    return None


def broadcast(values: Sequence[Value]) -> Value | str:
    """What an elementwise function of `values` gives; in words where rows would meet."""
    if any(value.kind is Dependence.SIZES for value in values):
        return unknown("computes with the number of rows")
    of_rows = [value for value in values if value.kind is Dependence.ROWS]
    ranks = [value.rank for value in values]
    if not of_rows:
        dims = None if None in ranks else _joined([value.dims or () for value in values])
        return constant(dims)
    if None in ranks:
        # A tensor of unknown rank may reach the rows' axis.
        return UNKNOWN
    rank = max(r for r in ranks if r is not None)
    from_right = {(value.rank or 0) - value.axis for value in of_rows}
    if len(from_right) > 1:
        return "combines rows with rows"
    if len({value.layout for value in of_rows}) > 1:
        return UNKNOWN
    (behind,) = from_right
    for value in values:
        if value.kind is Dependence.CONSTANT and (value.rank or 0) >= behind:
            size = (value.dims or ())[len(value.dims or ()) - behind]
            if size is None:
                return UNKNOWN
            if size != 1:
                return unknown("combines rows by their places with a constant")
    dims = _joined([value.dims or () for value in values])
    return of_rows[0].shaped(
        tuple(None if place == rank - behind else d for place, d in enumerate(dims)), rank - behind
    )


def _joined(shapes: Sequence[Dims]) -> Dims:
    """The shape that these broadcast to."""
    rank = max((len(shape) for shape in shapes), default=0)
    found: list[int | None] = []
    for place in range(rank):
        here = [s[place - rank + len(s)] for s in shapes if place - rank + len(s) >= 0]
        known = [size for size in here if size is not None and size != 1]
        found.append(known[0] if known else None if None in here else 1)
    return tuple(found)


def count(dims: Sequence[int | None]) -> int | None:
    """Elements of a shape; None where a size is not known."""
    return None if any(size is None for size in dims) else math.prod(size for size in dims if size is not None)
