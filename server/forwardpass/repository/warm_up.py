"""The runs of a model before it is ready: batches of increasing size, and the requests in its options.

They fill caches and arenas, and give the run-time model its first observations.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.errors import ConfigError, ModelError, RequestError
from forwardpass.execution.session import Runnable
from forwardpass.execution.stacking import stack
from forwardpass.inference.tensor_contents import ELEMENT_LIMIT
from forwardpass.model.example_inputs import example
from forwardpass.model.options import ModelConfig, WarmUp, WarmUpInput
from forwardpass.model.signature import ModelSignature, TensorSpec

logger = logging.getLogger(__name__)

SECONDS = 0.5  # of warm-up in total, however slow a run is; every size runs at least once
RUNS = 5
FOLDER = "warmup"  # the folder of input files, in the model's folder


class RunTimes(NamedTuple):
    """What the runs of every size took."""

    model: RunTimeModel
    largest: float  # the least seconds of a run of the largest size; 0 if it could not be run


def every_size(
    signature: ModelSignature,
    session: Runnable,
    largest: int,
    samples: Sequence[NDArray[Any]] | None,
    clock: Callable[[], float] = time.monotonic,
) -> RunTimes:
    """Run batches of 1, 2, 4 ... `largest` rows; of `samples`, real rows per input, if known. Times are by `clock`."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, sizes[-1] * 2))
    return _runs(signature, session, sizes, samples, clock)


def smallest_and_largest(
    signature: ModelSignature, session: Runnable, largest: int, samples: Sequence[NDArray[Any]] | None
) -> None:
    """The runs of a network of which `every_size` is known from another one: they allocate what the others need."""
    _runs(signature, session, sorted({1, largest}), samples, time.monotonic)


def _runs(
    signature: ModelSignature,
    session: Runnable,
    sizes: Sequence[int],
    samples: Sequence[NDArray[Any]] | None,
    clock: Callable[[], float],
) -> RunTimes:
    rng = np.random.default_rng(0)
    began = time.monotonic()
    run_time, least = RunTimeModel(), math.inf
    for size in sizes:
        if samples is not None:
            arrays = [np.resize(s, (size, *s.shape[1:])) if signature.batchable else s for s in samples]
        else:
            arrays = [example(t, size if signature.batchable else _first(t.shape), rng) for t in signature.inputs]
        for i in range(RUNS):
            since = clock()
            try:
                session.run(arrays, signature.default_outputs)
            except RequestError as error:
                logger.info("warm-up with made-up values of %d rows failed: %s", size, error)
                break
            seconds = clock() - since
            if size == sizes[-1]:
                least = min(least, seconds)
            if i:  # the first run allocates
                run_time.observe(size, seconds)
            if time.monotonic() - began > SECONDS:
                break
    return RunTimes(run_time, least if least < math.inf else 0.0)


def as_told(signature: ModelSignature, session: Runnable, config: ModelConfig, model_folder: Path) -> None:
    """Run the warm-up requests in the model's options. Raises ConfigError, or ModelError if one of them fails."""
    for request in config.warm_up:
        what = f"{config.where('warm_up')}: request '{request.name}'"
        arrays = _made(request, signature, model_folder, what)
        for _ in range(request.count):
            try:
                session.run(arrays, signature.default_outputs)
            except RequestError as error:
                raise ModelError(f"{what} failed: {error}") from None


def _made(request: WarmUp, signature: ModelSignature, model_folder: Path, what: str) -> list[NDArray[Any]]:
    names, expected = sorted(request.inputs), sorted(t.name for t in signature.inputs)
    if names != expected:
        raise ConfigError(f"{what}: expected the inputs {', '.join(expected)}, got {', '.join(names)}")
    if request.rows > 1 and not signature.batchable:
        raise ConfigError(f"{what}: expected one row, since axis 0 of the network is not a batch, got {request.rows}")
    rng = np.random.default_rng(0)
    arrays = []
    for tensor in signature.inputs:
        given = request.inputs[tensor.name]
        if given.datatype != tensor.datatype.name:
            raise ConfigError(
                f"{what}: input '{tensor.name}': expected {tensor.datatype.name}, as the network, got {given.datatype}"
            )
        shape = (request.rows, *given.dims) if signature.batchable else tuple(given.dims)
        if len(shape) != len(tensor.shape) or any(t not in (-1, s) for t, s in zip(tensor.shape, shape, strict=True)):
            row = list(tensor.shape[1:] if signature.batchable else tensor.shape)
            raise ConfigError(f"{what}: input '{tensor.name}': expected dims {row}, got {given.dims}")
        if math.prod(s or 1 for s in shape) > ELEMENT_LIMIT:
            raise ConfigError(f"{what}: input '{tensor.name}': the sizes of {list(shape)} are out of range")
        arrays.append(
            _values(
                given, TensorSpec(tensor.name, tensor.datatype, shape), rng, signature.batchable, model_folder, what
            )
        )
    return arrays


def _values(
    given: WarmUpInput, tensor: TensorSpec, rng: np.random.Generator, in_rows: bool, model_folder: Path, what: str
) -> NDArray[Any]:
    """The values of one input. The tensor's shape must have fixed sizes."""
    shape, dtype = tensor.shape, tensor.datatype.numpy
    if given.data == "zero":
        return np.full(shape, "", dtype=object) if dtype is None else np.zeros(shape, dtype)
    if given.data == "random":
        return example(tensor, shape[0], rng) if shape else np.asarray(example(tensor, 1, rng)[0])
    path = model_folder / FOLDER / str(given.file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read: {error.strerror or error}") from None
    # The file has all rows, or one row to repeat.
    for part in (shape, (1, *shape[1:])) if in_rows else (shape,):
        with contextlib.suppress(ValueError, RequestError):
            return np.resize(stack(tensor, [data], part), shape)
    raise ConfigError(f"{what}: {path} has {len(data)} bytes; expected those of {list(shape)} {given.datatype}")


def _first(shape: tuple[int, ...]) -> int:
    """The size of axis 0 of a made-up input; 1 if it may be any size."""
    return shape[0] if shape and shape[0] >= 0 else 1
