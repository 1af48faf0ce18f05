"""The inputs of a network: `NAME:DTYPE[DIM,...]`, as in `x:float32[batch,64]`, and values for them.

A dimension is an integer, or a symbol for any size; a symbol has the same size in all inputs. Pure: numpy only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import ExportError
from forwardpass.model.contract_tensor import DTYPES, ContractTensor

# The dtypes of the protocol, by numpy's names, and `text`.
TEXT = "text"
_DTYPES = {TEXT if dtype.kind == "O" else dtype.name: dtype for dtype in DTYPES.values()}
NUMERIC = [name for name in _DTYPES if name != TEXT]
_DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()}
_SPEC = re.compile(r"\s*(?P<name>[A-Za-z_][\w.-]*)\s*:\s*(?P<dtype>\w+)\s*\[(?P<dims>[^\[\]]*)\]\s*", re.ASCII)
_SYMBOL = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input: its name, its dtype, and for each axis a size or a symbol."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Parse `NAME:DTYPE[DIM,...]`. Raises ExportError saying what was expected."""
        match = _SPEC.fullmatch(text)
        if match is None:
            raise ExportError(f"input {text!r}: expected NAME:DTYPE[DIM,...], as in 'x:float32[batch,64]'")
        dtype = _DTYPES.get(match["dtype"])
        if dtype is None:
            raise ExportError(f"input {text!r}: has dtype {match['dtype']!r}; expected one of {', '.join(_DTYPES)}")
        dims: list[int | str] = []
        for part in match["dims"].split(",") if match["dims"].strip() else []:
            dim = part.strip()
            if dim.isdecimal() and int(dim) > 0:
                dims.append(int(dim))
            elif _SYMBOL.fullmatch(dim):
                dims.append(dim)
            else:
                raise ExportError(
                    f"input {text!r}: has the dimension {dim!r}; expected an integer above 0, or a symbol"
                )
        return cls(match["name"], dtype, tuple(dims))

    def __str__(self) -> str:
        dtype = TEXT if self.dtype.kind == "O" else self.dtype.name
        return f"{self.name}:{dtype}[{','.join(str(dim) for dim in self.dims)}]"

    def tensor(self) -> ContractTensor:
        """The input in the contract's form: -1 for every symbol."""
        shape = [dim if isinstance(dim, int) else -1 for dim in self.dims]
        return ContractTensor(name=self.name, datatype=_DATATYPES[self.dtype], shape=shape)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its size."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)


def parse_inputs(inputs: Mapping[str, str] | Iterable[str | InputSpec], text: bool = False) -> list[InputSpec]:
    """Parse a mapping of name to `DTYPE[DIM,...]`, or inputs in the full form. Raises ExportError.

    `text`: inputs may be text, which no PyTorch network takes.
    """
    if isinstance(inputs, str):
        raise ExportError(f"inputs: expected a list or a mapping, got the text {inputs!r}")
    if isinstance(inputs, Mapping):
        inputs = [f"{name}:{rest}" for name, rest in inputs.items()]
    specs = [spec if isinstance(spec, InputSpec) else InputSpec.parse(spec) for spec in inputs]
    if not specs:
        raise ExportError("a network needs at least one input, as in 'x:float32[batch,64]'")
    wordy = next((spec for spec in specs if spec.dtype.kind == "O" and not text), None)
    if wordy is not None:
        raise ExportError(f"input '{wordy}': a PyTorch network takes no text; expected one of {', '.join(NUMERIC)}")
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ExportError(f"two inputs have the same name: {', '.join(names)}")
    return specs


def symbols(specs: Iterable[InputSpec]) -> list[str]:
    """Every symbol, in order of appearance."""
    return list(dict.fromkeys(dim for spec in specs for dim in spec.dims if isinstance(dim, str)))


def batch_symbol(specs: Iterable[InputSpec]) -> str | None:
    """The symbol that is axis 0 of every input and no other axis; None if there is none, and so no batch."""
    specs = list(specs)
    firsts = {spec.dims[0] if spec.dims else None for spec in specs}
    first = next(iter(firsts))
    if len(firsts) > 1 or not isinstance(first, str) or any(first in spec.dims[1:] for spec in specs):
        return None
    return first


def draw(
    specs: Iterable[InputSpec], sizes: Mapping[str, int], bound: int, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Random values: standard normal for floats, 0 <= value < bound for integers, either for booleans."""
    values: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = spec.shape(sizes)
        if spec.dtype.kind == "f":
            values[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            values[spec.name] = rng.integers(0, 2 if spec.dtype.kind == "b" else bound, shape).astype(spec.dtype)
    return values


def fit_samples(
    specs: Iterable[InputSpec], samples: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """A caller's values in the inputs' dtypes, and the sizes of the symbols in them.

    Raises ExportError if one is missing, does not fit its shape or its dtype, or two disagree about a symbol.
    """
    specs = list(specs)
    if set(samples) != {spec.name for spec in specs}:
        raise ExportError(f"samples: are for {sorted(samples)}; expected {sorted(spec.name for spec in specs)}")
    values: dict[str, NDArray[Any]] = {}
    sizes: dict[str, int] = {}
    for spec in specs:
        given = np.asarray(samples[spec.name])
        if given.ndim != len(spec.dims):
            raise ExportError(f"samples: {spec.name!r} has shape {list(given.shape)}; expected {spec}")
        for dim, size in zip(spec.dims, given.shape, strict=True):
            expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != expected or size == 0:
                why = f"{dim} = {expected}" if isinstance(dim, str) else str(expected)
                raise ExportError(f"samples: {spec.name!r} has shape {list(given.shape)}; expected {spec}, {why}")
        with np.errstate(all="ignore"):
            fitted = given.astype(spec.dtype)
        floats = spec.dtype.kind == given.dtype.kind == "f"  # clients round to a narrower float too
        if not floats and not np.array_equal(fitted, given):
            raise ExportError(f"samples: {spec.name!r} holds {given.dtype} values that do not fit {spec.dtype}")
        values[spec.name] = fitted
    return values, sizes
