"""The numerical contract of an exported model: `contract.json` beside `model.onnx`.

It lists every file with its sha256, every tensor, and a few sample rows with the outputs the network must compute for
them. The exporter writes it; a server checks it on the provider it will serve on. This module runs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator

from forwardpass.errors import ContractError
from forwardpass.model.contract_tensor import ContractPart, ContractTensor

CONTRACT_FILE = "contract.json"
MODEL_FILE = "model.onnx"

# JSON has no NaN and no infinities: they are written as these strings, spelled as in protobuf's JSON mapping.
_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

Arrays = Mapping[str, NDArray[Any]]


class Tolerance(ContractPart):
    """An element is correct if |got - expected| <= atol + rtol * |expected|."""

    rtol: float = Field(ge=0, allow_inf_nan=False)
    atol: float = Field(ge=0, allow_inf_nan=False)


class Samples(ContractPart):
    """Sample rows and their expected outputs, as nested lists by tensor name. `Contract` returns them as arrays."""

    rows: int = Field(ge=1)  # of the sample batch; 1 if the model is not batchable
    inputs: dict[str, Any]
    expected: dict[str, Any]

    @classmethod
    def from_arrays(cls, rows: int, inputs: Arrays, expected: Arrays) -> Samples:
        """Convert arrays to lists, exact to the last bit: integers as integers, NaN and infinities as strings."""
        return cls(
            rows=rows,
            inputs={name: _as_lists(array) for name, array in inputs.items()},
            expected={name: _as_lists(array) for name, array in expected.items()},
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between outputs and expected values."""

    largest: float  # the largest |got - expected| of all elements; inf if one is not finite or has no counterpart
    failure: str | None  # None: all within tolerance; else which output, which element, by how much


class Contract(ContractPart):
    """The description and expected outputs of an exported model. Fields are as in the JSON file, in this order.

    - `files` lists every file of the version's folder except the contract itself.
    - `samples.inputs` has exactly the inputs, `samples.expected` exactly the outputs; hidden outputs are not sampled.
    - `expected` is the reference in float64 for floating outputs, exact values for all others.
    """

    format: Literal[1] = 1
    model: str = Field(min_length=1)
    version: int = Field(ge=1)
    files: dict[str, str]  # relative path in the folder, with "/" -> sha256 in hex
    inputs: list[ContractTensor]
    outputs: list[ContractTensor] = Field(min_length=1)
    hidden: list[ContractTensor] = Field([])  # outputs computed only if requested
    batchable: bool  # axis 0 of every input and output is the batch
    batch_invariant: bool | None  # a row's output is the same, bit for bit, alone and in a batch; None: not measured
    rows_independent: bool | None = None  # equal within the tolerance: rows do not mix; None: not measured
    opset: int
    torch: str
    onnxruntime: str
    provider: str  # the execution provider the difference was measured on
    reference: Literal["float64", "float32"] = "float64"  # the precision that `expected` was computed in
    precision: Literal["native", "fp16"] = "native"  # fp16: its layers were converted to half precision
    source: str | None = None  # a digest of the model's source, if the exporter's caller passed one
    samples: Samples
    tolerance: Tolerance
    largest_difference: float = Field(ge=0, allow_inf_nan=False)  # measured by the exporter over all its trials

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name, digest in files.items():
            path = PurePosixPath(name)
            if (
                not name
                or "\\" in name
                or "\0" in name
                or path.is_absolute()
                or ".." in path.parts
                or str(path) != name
            ):
                raise ValueError(f"names the file {name!r}; expected a path inside the version's folder")
            if name == CONTRACT_FILE:
                raise ValueError(f"names {CONTRACT_FILE}, which cannot hold its own digest")
            if len(digest) != 64 or digest.strip("0123456789abcdef"):
                raise ValueError(f"gives {name!r} the digest {digest!r}; expected 64 lower-case hexadecimal digits")
        return files

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for kind, tensors in (("inputs", self.inputs), ("outputs", [*self.outputs, *self.hidden])):
            names = [tensor.name for tensor in tensors]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{kind}: named twice: {', '.join(twice)}")
        for kind, values, tensors in (
            ("samples.inputs", self.samples.inputs, self.inputs),
            ("samples.expected", self.samples.expected, self.outputs),
        ):
            declared = {tensor.name for tensor in tensors}
            if set(values) != declared:
                raise ValueError(f"{kind}: has {sorted(values)}; expected {sorted(declared)}")
            for tensor in tensors:
                array = _as_array(values[tensor.name], tensor.dtype, f"{kind}.{tensor.name}")
                _check_shape(array.shape, tensor, self.samples.rows if self.batchable else None, kind)
        return self

    @classmethod
    def load(cls, path: Path) -> Contract:
        """Read and validate. Raises ContractError naming the file, the field and the problem."""
        try:
            data = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        except OSError as error:
            raise ContractError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise ContractError(f"{path}: is not JSON: {error}") from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            text = first["msg"].removeprefix("Value error, ")
            raise ContractError(f"{path}: {field}: {text}" if field else f"{path}: {text}") from None

    def save(self, path: Path) -> None:
        """Write as JSON, one field per line, and flush it to the disk. Raises OSError."""
        fields = self.model_dump(mode="python")
        lines = [f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items()]
        with path.open("w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
            file.flush()
            os.fsync(file.fileno())

    def verify_files(self, folder: Path) -> None:
        """Check that every file is present and unchanged, and that there is no other. Raises ContractError naming it.

        Links are followed if they end inside the folder; entries named `..*`, by which Kubernetes updates a mounted
        volume atomically, are not files of the version.
        """
        try:
            present = set(_files(folder))
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, in Python 3.11 and 3.12
            raise ContractError(f"{folder}: cannot be read: {error}") from None
        missing = sorted(set(self.files) - present)
        if missing:
            raise ContractError(f"{folder}: missing {', '.join(missing)}, which its contract lists")
        extra = sorted(present - set(self.files))
        if extra:
            raise ContractError(f"{folder}: has {', '.join(extra)}, which its contract does not list")
        for name, expected in self.files.items():
            found = file_digest(folder / name)
            if found != expected:
                raise ContractError(f"{folder / name}: was changed: sha256 is {found}, its contract has {expected}")

    def input_arrays(self) -> dict[str, NDArray[Any]]:
        """The sample rows, [rows, ...] each, in the inputs' own dtypes (BYTES: arrays of str)."""
        return {
            tensor.name: _as_array(self.samples.inputs[tensor.name], tensor.dtype, tensor.name)
            for tensor in self.inputs
        }

    def expected_arrays(self) -> dict[str, NDArray[Any]]:
        """The expected outputs of the sample rows: float64 for floating outputs, all others in their own dtypes."""
        return {
            tensor.name: _as_array(self.samples.expected[tensor.name], reference_dtype(tensor.dtype), tensor.name)
            for tensor in self.outputs
        }

    def check(self, outputs: Arrays) -> Difference:
        """Compare the outputs for the samples with the contract; `outputs` may have further names (hidden outputs).

        Raises ContractError naming the output, the element, the expected and actual values, and the allowed difference.
        """
        for tensor in self.outputs:
            got = outputs.get(tensor.name)
            # Text may be an array of objects or of fixed-width strings; every other dtype must match exactly.
            if (
                got is not None
                and got.dtype != tensor.dtype
                and not (tensor.datatype == "BYTES" and got.dtype.kind in "SU")
            ):
                raise ContractError(f"output {tensor.name!r} has dtype {got.dtype}; expected {tensor.datatype}")
        difference = compare(outputs, self.expected_arrays(), self.tolerance)
        if difference.failure is not None:
            raise ContractError(difference.failure)
        return difference


def compare(outputs: Arrays, expected: Arrays, tolerance: Tolerance) -> Difference:
    """Compare every expected array with the output of the same name; other outputs are ignored.

    Floats are correct within the tolerance, NaN if NaN is expected, an infinity if the same one is expected; all other
    values must be equal. The failure describes the element that exceeds the allowed difference the most.
    """
    largest = 0.0
    worst = 0.0
    failure: str | None = None
    for name, want in expected.items():
        if name not in outputs:
            return Difference(float("inf"), f"output {name!r} is missing; got {', '.join(outputs) or 'none'}")
        got = np.asarray(outputs[name])
        if got.shape != want.shape:
            return Difference(float("inf"), f"output {name!r} has shape {list(got.shape)}; expected {list(want.shape)}")
        if not want.size:
            continue
        distance, allowed = _distances(got, want, tolerance)
        largest = max(largest, float(distance.max()))
        excess = distance - allowed
        place = np.unravel_index(int(excess.argmax()), want.shape)
        if excess[place] > worst:
            worst = float(excess[place])
            failure = (
                f"output {name!r} at {[int(i) for i in place]}: expected {_plain(want[place])}, "
                f"got {_plain(got[place])}: |difference| {distance[place]:.3g}, allowed {allowed[place]:.3g}; "
                f"{int(np.count_nonzero(excess > 0))} of {want.size} elements are off"
            )
    return Difference(largest, failure)


def reference_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of expected values: float64 for floats of any width, else the dtype itself."""
    return np.dtype(np.float64) if dtype.kind == "f" else dtype


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex. Raises ContractError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ContractError(f"{path}: cannot be read: {error.strerror or error}") from None


def _distances(got: NDArray[Any], want: NDArray[Any], tolerance: Tolerance) -> tuple[NDArray[Any], NDArray[Any]]:
    """|got - want| and the allowed difference, float64, elementwise."""
    if want.dtype.kind != "f":
        unequal = np.asarray(got != want, dtype=np.bool_)
        distance = unequal.astype(np.float64)
        if want.dtype.kind in "iu":
            # With Python's integers: the difference of two 64-bit integers may not fit in 64 bits.
            distance[unequal] = [abs(int(g) - int(w)) for g, w in zip(got[unequal], want[unequal], strict=True)]
        return distance, np.zeros(want.shape)
    wide = got.astype(np.float64)
    same = (wide == want) | (np.isnan(wide) & np.isnan(want))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(wide - want)
        allowed = tolerance.atol + tolerance.rtol * np.abs(want)
    both_finite = np.isfinite(wide) & np.isfinite(want)
    return (
        np.where(same, 0.0, np.where(both_finite, apart, np.inf)),
        np.where(np.isfinite(allowed), allowed, tolerance.atol),
    )


def _plain(value: Any) -> str:
    plain = value.item() if isinstance(value, np.generic) else value
    return f"{plain:.9g}" if isinstance(plain, float) else repr(plain)


def _check_shape(shape: tuple[int, ...], tensor: ContractTensor, rows: int | None, kind: str) -> None:
    wanted = list(tensor.shape)
    if rows is not None:
        if not wanted or wanted[0] not in (-1, rows):
            raise ValueError(f"tensor {tensor.name!r} has shape {tensor.shape}; expected axis 0 to be the batch, -1")
        wanted[0] = rows
    if len(shape) != len(wanted) or any(want not in (-1, size) for size, want in zip(shape, wanted, strict=True)):
        raise ValueError(f"{kind}.{tensor.name}: has shape {list(shape)}; expected {wanted}")


def _as_lists(array: NDArray[Any]) -> Any:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wide = array.astype(np.float64).astype(object)
        wide[np.isnan(array)] = "NaN"
        wide[np.isposinf(array)] = "Infinity"
        wide[np.isneginf(array)] = "-Infinity"
        return wide.tolist()
    return array.tolist()


def _as_array(values: Any, dtype: np.dtype[Any], field: str) -> NDArray[Any]:
    """Convert nested lists to an array. Raises ValueError naming the field if a value does not fit the dtype."""
    leaves = np.array(values, dtype=object)  # rows of different lengths stay lists, which fit no dtype
    flat = leaves.ravel().tolist()
    if dtype.kind == "f":
        flat = [_NOT_FINITE.get(value, value) if isinstance(value, str) else value for value in flat]
        fits: tuple[type, ...] = (float, int)
    else:
        fits = {"b": (bool,), "O": (str,)}.get(dtype.kind, (int,))
    for value in flat:
        if not isinstance(value, fits) or (isinstance(value, bool) and dtype.kind != "b"):
            raise ValueError(f"{field}: has the value {value!r}; expected {dtype if dtype.kind != 'O' else 'text'}")
    array = np.empty(len(flat), dtype)
    try:
        with np.errstate(over="raise"):
            array[:] = np.array(flat, np.float64) if dtype.kind == "f" else flat
    except (OverflowError, FloatingPointError):
        raise ValueError(f"{field}: has a value that does not fit {dtype}") from None
    return array.reshape(leaves.shape)


def _files(folder: Path) -> Iterator[str]:
    """Every file below `folder`, as a relative path with "/", except the contract and options. Raises ContractError."""
    home = folder.resolve()
    if not home.is_dir():
        raise ContractError(f"{folder}: is not a folder")
    beside = [folder / name for name in (CONTRACT_FILE, "model.toml", "config.pbtxt")]
    visited = {home}  # resolved, so that a loop of links ends
    pending = [folder]
    while pending:
        for entry in sorted(pending.pop().iterdir()):
            if entry.name.startswith("..") or entry in beside:
                continue
            target = entry.resolve()
            if not target.is_relative_to(home):
                raise ContractError(f"{entry}: links to {target}, outside the version's folder")
            if not entry.is_dir():
                yield entry.relative_to(folder).as_posix()
            elif target not in visited:
                visited.add(target)
                pending.append(entry)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"has {text}, which JSON does not know; expected the string {text!r}")
