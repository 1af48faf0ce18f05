"""More rows than one request takes: sent in chunks, several under way, answers in the order of the rows.

Chunks fit the server's limits where its metadata has them, and are small enough that all that are under way together
fit a queue of default size. Memory holds the chunks under way, whatever the number of rows.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TextIO

import numpy as np
from numpy.typing import NDArray

from forwardpass import protocol
from forwardpass.client import Answer, CallError, Client, ModelInfo, TensorInfo
from forwardpass.console.row_reader import RowSource, chunks
from forwardpass.errors import ForwardpassError

IN_FLIGHT: Final = 4  # requests, unless asked otherwise
CHUNK_BYTES: Final = 1 << 20  # of one request or answer: more would not go faster
CHUNK_ROWS: Final = 2048
UNKNOWN_LIMIT: Final = 4 << 20  # bytes of a message, where the server does not say: gRPC's own default
OVERHEAD: Final = 4096  # bytes of a message beside its tensors
SHOWN_EVERY: Final = 0.2  # seconds

Sources = Mapping[str, RowSource]


def divisible(info: ModelInfo) -> bool:
    """Whether a model's rows may go in several requests: axis 0 is the batch, no row changes another's answer."""
    tensors = (*info.inputs, *info.outputs)
    batchable = all(tensor.shape and tensor.shape[0] < 0 for tensor in tensors)
    return batchable and bool(info.parameters.get("max_batch_size", 1))


def request_rows(info: ModelInfo, sources: Sources) -> int:
    """The most rows that one request takes, by the server's limits."""
    most = _whole(info, "max_request_rows") or 1 << 62
    limit = _whole(info, "max_message_bytes") or UNKNOWN_LIMIT
    return max(1, min(most, (limit - OVERHEAD) // _row_bytes(info, sources)))


def chunk_rows(info: ModelInfo, sources: Sources, outputs: list[str] | None = None) -> int:
    """The rows of one chunk."""
    wanted = [t for t in info.outputs if outputs is None or t.name in outputs]
    answer = sum(_bytes(t, tuple(max(1, size) for size in t.shape[1:])) for t in wanted)
    by_bytes = CHUNK_BYTES // max(1, answer, _row_bytes(info, sources))
    return max(1, min(request_rows(info, sources), CHUNK_ROWS, by_bytes))


def _whole(info: ModelInfo, name: str) -> int:
    value = info.parameters.get(name)
    return value if isinstance(value, int) and value > 0 else 0


def _row_bytes(info: ModelInfo, sources: Sources) -> int:
    return max(1, sum(_bytes(info.input_named[name], source.row_shape) for name, source in sources.items()))


def _bytes(tensor: TensorInfo, shape: tuple[int, ...]) -> int:
    """Bytes of one row of a tensor; of a text 64 are assumed."""
    datatype = protocol.DATATYPES.get(tensor.datatype)
    return math.prod(shape) * ((datatype.itemsize if datatype is not None else 0) or 64)


class Progress:
    """A line on a terminal that shows how far it is; nothing anywhere else."""

    def __init__(self, total: int | None, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._shown = self._out.isatty()
        self._total = total
        self._began = time.monotonic()
        self._next = 0.0

    def show(self, rows: int) -> None:
        now = time.monotonic()
        if self._shown and now >= self._next:
            self._next = now + SHOWN_EVERY
            of = "" if self._total is None else f" of {self._total:,}"
            self._out.write(f"\r{rows:,}{of} rows, {rows / max(1e-9, now - self._began):,.0f} a second\x1b[K")
            self._out.flush()

    def clear(self) -> None:
        if self._shown:
            self._out.write("\r\x1b[K")
            self._out.flush()


def _requests(sources: Sources, rows: int) -> Iterator[dict[str, NDArray[Any]]]:
    """The inputs of each chunk. Raises ForwardpassError if the inputs differ in their number of rows."""
    streams = {name: chunks(source.parts(), rows) for name, source in sources.items()}
    sent = 0
    while True:
        found = {name: next(stream, None) for name, stream in streams.items()}
        there = {name: part for name, part in found.items() if part is not None}
        lengths = {name: sent + (0 if part is None else len(part)) for name, part in found.items()}
        if len(set(lengths.values())) > 1:
            shortest = min(lengths, key=lambda name: lengths[name])
            raise ForwardpassError(
                f"inputs differ in their number of rows: '{shortest}' ends after {lengths[shortest]}, others go on"
            )
        if not there:
            return
        sent = next(iter(lengths.values()))
        yield there


def answers(
    client: Client, info: ModelInfo, sources: Sources, rows: int, *, in_flight: int = IN_FLIGHT, **options: Any
) -> Iterator[Answer]:
    """The answer to each chunk of `rows` rows, in order. `options`: of `Client.infer`.

    Raises ForwardpassError that names the range of rows of the first chunk that failed, counted from 0.
    """
    total = next((source.rows for source in sources.values() if source.rows is not None), None)
    progress = Progress(total)
    under_way: deque[tuple[int, int, Future[Answer]]] = deque()
    done = first = 0
    version: str | None = None
    with ThreadPoolExecutor(in_flight, thread_name_prefix="bulk") as pool, contextlib.ExitStack() as stack:
        stack.callback(progress.clear)
        stack.callback(lambda: [future.cancel() for _, _, future in under_way])
        requests = _requests(sources, rows)
        more = True
        while more or under_way:
            while more and len(under_way) < in_flight:
                inputs = next(requests, None)
                if inputs is None:
                    more = False
                    break
                count = len(next(iter(inputs.values())))
                under_way.append((first, count, pool.submit(client.infer, info.name, inputs, **options)))
                first += count
            if not under_way:
                return
            start, count, future = under_way.popleft()
            try:
                answer = future.result()
                _check(answer, count)
            except (CallError, ForwardpassError) as error:
                raise ForwardpassError(f"rows {start} to {start + count - 1}: {error}") from None
            if version is not None and answer.version != version:
                raise ForwardpassError(
                    f"rows {start} to {start + count - 1}: version {answer.version} answered, and version {version} "
                    "before: ask for one by --version"
                )
            version = answer.version
            done += count
            progress.show(done)
            yield answer


def _check(answer: Answer, rows: int) -> None:
    for name, array in answer.items():
        if not array.ndim or len(array) != rows:
            raise ForwardpassError(f"expected an output '{name}' of {rows} rows, got shape {list(np.shape(array))}")
