"""ModelInfer request bodies, built from a file, or from random values that match the model's metadata.

Depends on the protocol, not on the load. Requests are built once, before the load begins, and sent repeatedly.
"""

from __future__ import annotations

import csv
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass import protocol
from forwardpass.client import PLAIN, Access, Client
from forwardpass.client.arrays import TensorInfo, fit, to_raw
from forwardpass.client.errors import CallError
from forwardpass.client.raw_calls import RawChannel
from forwardpass.client.results import ModelInfo
from forwardpass.console import array_files
from forwardpass.errors import LoadTestError

PATH = protocol.METHODS["ModelInfer"].path
DISTINCT = 64  # maximum number of different requests for each row count
ENOUGH_BYTES = 16 << 20  # approximate limit for all requests; above it, fewer different ones are built
OPEN_AXIS = 16  # the size used for an axis of unspecified size, except the batch axis

Mix = Mapping[int, float]  # rows per request: relative frequency, in any unit


@dataclass(frozen=True, slots=True)
class Requests:
    """Serialised ModelInferRequests. `rows[i]`: rows of message i; `weights[i]`: how often it is sent."""

    messages: Sequence[bytes]
    rows: Sequence[int]
    weights: Sequence[float]
    source: str  # the origin of the values, for the report

    @property
    def mean_rows(self) -> float:
        return float(np.average(self.rows, weights=self.weights))


def read_mix(path: Path) -> dict[int, float]:
    """A recorded mix: a row count a line, or `rows,count` a line; a first line of words is a header."""
    found: dict[int, float] = {}
    try:
        lines = [cells for cells in csv.reader(path.read_text("utf-8").splitlines()) if cells]
    except OSError as error:
        raise LoadTestError(f"{path}: {error.strerror or error}") from None
    for number, cells in enumerate(lines, 1):
        try:
            rows, count = int(cells[0]), float(cells[1]) if len(cells) > 1 else 1.0
        except ValueError:
            if number == 1:
                continue
            raise LoadTestError(
                f"{path}, line {number}: expected rows or rows,count, got {','.join(cells)!r}"
            ) from None
        if rows < 1 or count < 0:
            raise LoadTestError(
                f"{path}, line {number}: expected at least one row and a count, got {','.join(cells)!r}"
            )
        found[rows] = found.get(rows, 0.0) + count
    if not sum(found.values()):
        raise LoadTestError(f"{path}: has no row counts")
    return found


def parse_mix(text: str) -> dict[int, float]:
    """ "8" or "1:70,8:20,64:10". Raises ValueError with the expected form."""
    found: dict[int, float] = {}
    for part in text.split(","):
        rows, _, weight = part.partition(":")
        try:
            found[int(rows)] = float(weight or 1)
        except ValueError:
            raise ValueError(f"expected ROWS or ROWS:WEIGHT,ROWS:WEIGHT,..., got {text!r}") from None
    if min(found) < 1 or min(found.values()) < 0 or not sum(found.values()):
        raise ValueError(f"expected at least one row and positive weights, got {text!r}")
    return found


def info(address: str, model: str, version: str = "", access: Access = PLAIN) -> ModelInfo:
    """The model's inputs and outputs. Raises CallError if the server does not respond or has no such model."""
    with Client(address, health_check=False, timeout=10.0, attempts=1, **access.options()) as client:
        return client.metadata(model, version=version)


def make(model: ModelInfo, version: str, mix: Mix, file: Path | None, seed: int) -> Requests:
    """Build requests for every row count of the mix. Raises LoadTestError, or InvalidArgument if values do not fit."""
    total = sum(mix.values())
    arrays = None if file is None else array_files.read(file, sys.stdin, model.inputs)
    generator = np.random.default_rng(seed)
    messages: list[bytes] = []
    rows: list[int] = []
    weights: list[float] = []
    for count, weight in sorted(mix.items()):
        made: list[bytes] = []
        for number in range(DISTINCT):
            if arrays is None:
                values = {tensor.name: _random(tensor, count, generator) for tensor in model.inputs}
            else:
                values = _slice(arrays, number * count, count, file)
            message = _message(model, version, values)
            if message in made or len(made) * len(message) * len(mix) > ENOUGH_BYTES:
                break
            made.append(message)
        messages += made
        rows += [count] * len(made)
        weights += [weight / total / len(made)] * len(made)
    source = "random values by the model's metadata" if file is None else f"rows of {file.name}"
    return Requests(messages, rows, weights, source)


def _message(model: ModelInfo, version: str, values: Mapping[str, NDArray[Any]]) -> bytes:
    request = protocol.ModelInferRequest(model_name=model.name, model_version=version)
    raw = []
    for name, value in values.items():
        tensor = model.input_named[name]
        array = fit(value, tensor)
        request.inputs.add(name=name, datatype=tensor.datatype, shape=array.shape)
        raw.append(to_raw(array, name))
    request.raw_input_contents.extend(raw)
    return bytes(request.SerializeToString())


def _random(tensor: TensorInfo, rows: int, generator: np.random.Generator) -> NDArray[Any]:
    shape = tuple(
        rows if axis == 0 and size < 0 else OPEN_AXIS if size < 0 else size for axis, size in enumerate(tensor.shape)
    )
    datatype = protocol.DATATYPES.get(tensor.datatype)
    dtype = None if datatype is None else datatype.numpy
    if dtype is None:
        texts: NDArray[Any] = np.array([f"text {n}" for n in generator.integers(0, 1000, math.prod(shape))], object)
        return texts.reshape(shape)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    # Whether integers are indices or counts, 0 and 1 are valid.
    return generator.integers(0, 2, shape).astype(dtype)


def _slice(arrays: Mapping[str, NDArray[Any]], at: int, rows: int, file: Path | None) -> dict[str, NDArray[Any]]:
    """`rows` rows from `at` on, wrapping around at the end."""
    found = {}
    for name, array in arrays.items():
        if array.ndim == 0 or not len(array):
            raise LoadTestError(f"{file}: '{name}' has no rows")
        found[name] = np.take(array, range(at, at + rows), axis=0, mode="wrap")
    return found


def model_config(address: str, model: str, access: Access = PLAIN) -> Any:
    """A model's configuration in the server, an inference.ModelConfig. Raises LoadTestError if it returns none."""
    method = protocol.METHODS["ModelConfig"]
    with RawChannel(address, access) as channel:
        try:
            found = channel.call(method.path, method.request(name=model).SerializeToString(), 10.0)
        except CallError as error:
            raise LoadTestError(f"{address} does not report the max_batch_size of '{model}' ({error})") from None
    return method.response.FromString(found).config


def max_batch_rows(address: str, model: str, access: Access = PLAIN) -> int:
    """The model's max_batch_size in the server's configuration. Raises LoadTestError if the server returns none."""
    return max(1, int(model_config(address, model, access).max_batch_size))


def answers(address: str, requests: Requests, every: bool, access: Access = PLAIN) -> list[bytes]:
    """The server's response to the first message, or to every one, each with gRPC's five-byte prefix.

    Verifies before the load that these requests can be answered at all. Raises CallError as a client would.
    """
    found = []
    with RawChannel(address, access) as channel:
        for message in itertools.islice(requests.messages, None if every else 1):
            answer = channel.call(PATH, message, 30.0)
            found.append(b"\x00" + len(answer).to_bytes(4, "big") + answer)
    return found
