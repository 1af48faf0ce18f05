"""What unit tests are put together from: interfaces, requests, reply sinks. All real, none of them mocked."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from forwardpass import protocol
from forwardpass.batching.request import QueueLimits, Request, WorkerOptions
from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.errors import RequestError
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.providers import place
from forwardpass.inference.request import AnyRequest, InferenceRequest, TimedInferenceRequest
from forwardpass.inference.request_template import RequestTemplate
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.protocol.bytes_tensors import pack
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.interface import Answer

FP32 = protocol.DATATYPES["FP32"]
ids = itertools.count()


def tensor(name: str, datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, protocol.DATATYPES[datatype], shape)


def signature(
    inputs: Sequence[TensorSpec] = (tensor("x", "FP32", -1, 2),),
    outputs: Sequence[TensorSpec] = (tensor("y", "FP32", -1, 2),),
    batchable: bool = True,
) -> ModelSignature:
    return ModelSignature(tuple(inputs), tuple(outputs), batchable)


class Numbered(Request):
    """One that tests can tell from others."""

    call: int


def queued(
    rows: int = 1,
    arrival: float = 0.0,
    deadline: float = math.inf,
    priority: int = 1,
    stack_key: Any = "a",
    nbytes: int = 100,
    start_by: float = math.inf,
) -> Numbered:
    """A request as the queue sees it."""
    request = Numbered(stack_key, (), rows, nbytes, arrival, deadline, priority)
    request.call = next(ids)
    if start_by != math.inf:
        request.start_by = start_by
    return request


def exact_run_time(a: float, b: float) -> RunTimeModel:
    """A run-time model that has seen enough to know a + b·rows exactly."""
    run_time = RunTimeModel()
    for rows in (1, 2, 4, 8, 16, 32) * 20:
        run_time.observe(rows, a + b * rows)
    return run_time


def session(model: onnx.ModelProto, folder: Path) -> OrtSession:
    """A network, opened on the CPU with one thread."""
    path = folder / f"{next(ids)}.onnx"
    onnx.save(model, str(path))
    return OrtSession(path, place("cpu", 1, "for a test"))


class Target:
    """A model version as the decoder sees it."""

    def __init__(
        self, found: ModelSignature, name: str = "m", version: str = "1", rows: int = 1000, priorities: int = 1
    ) -> None:
        self.signature = found
        self.name = name
        self.version = version
        self.options = WorkerOptions(QueueLimits(), max_request_rows=rows, priority_levels=priorities)

    def cancel(self, request: Any) -> None:
        raise AssertionError("nothing is cancelled here")


def message(
    inputs: Sequence[tuple[str, NDArray[Any]]], outputs: Sequence[str] = (), typed: bool = False, **fields: Any
) -> Any:
    """A ModelInferRequest for these arrays, raw or typed. Text is sent as BYTES."""
    request = protocol.ModelInferRequest(**{"model_name": "m", **fields})
    for name, array in inputs:
        datatype = datatype_of(array)
        entry = request.inputs.add(name=name, datatype=datatype.name, shape=array.shape)
        if typed:
            assert datatype.contents is not None
            values = [v.encode() if isinstance(v, str) else v for v in array.ravel().tolist()]
            getattr(entry.contents, datatype.contents).extend(values)
        else:
            request.raw_input_contents.append(raw(array))
    for name in outputs:
        request.outputs.add(name=name)
    return request


def datatype_of(array: NDArray[Any]) -> protocol.Datatype:
    if array.dtype == object:
        return protocol.DATATYPES["BYTES"]
    return next(d for d in protocol.DATATYPES.values() if d.numpy == array.dtype)


def raw(array: NDArray[Any]) -> bytes:
    if array.dtype == object:
        return pack(v.encode() if isinstance(v, str) else v for v in array.ravel().tolist())
    return array.tobytes()


def request_for(
    target: Any, arrays: Sequence[NDArray[Any]], outputs: tuple[int, ...] | None = None, sink: Any = None, **more: Any
) -> AnyRequest:
    """A decoded request, as an intake makes it, with the arrays in the model's order."""
    found = target.signature
    rows = len(arrays[0]) if found.batchable else 1
    chosen = found.default_outputs if outputs is None else outputs
    template = RequestTemplate(target, rows, tuple(a.shape for a in arrays), chosen, priority=0, timeout=math.inf)
    more["id_field"] = protocol.ModelInferResponse(id=more.pop("id", "")).SerializeToString()
    buffers = tuple(raw(a) for a in arrays)
    size = sum(map(len, buffers))
    deadline, arrival = more.pop("deadline", math.inf), more.pop("arrival", 0.0)
    priority, start_by = more.pop("priority", 1), more.pop("start_by", None)
    request = (InferenceRequest if start_by is None else TimedInferenceRequest)(
        template, buffers, rows or 1, size, arrival, deadline, priority, sink, next(ids), **more
    )
    if start_by is not None:
        request.start_by = start_by
    return request


def read(answer: bytes) -> tuple[Any, list[NDArray[Any]]]:
    """A ModelInferResponse from bytes, and its outputs as arrays (BYTES as bytes)."""
    response = protocol.ModelInferResponse.FromString(answer)
    arrays = []
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        datatype = protocol.DATATYPES[output.datatype]
        if datatype.numpy is None:
            items, place = [], 0
            while place < len(data):
                size = int.from_bytes(data[place : place + 4], "little")
                items.append(data[place + 4 : place + 4 + size])
                place += 4 + size
            arrays.append(np.array(items, object).reshape(tuple(output.shape)))
        else:
            arrays.append(np.frombuffer(data, datatype.numpy).reshape(tuple(output.shape)))
    return response, arrays


class Collector:
    """A reply sink that keeps what it is given, and knows when everything that it waits for has come."""

    def __init__(self) -> None:
        self.answers: dict[int, list[Answer]] = {}
        self.timings: dict[int, BatchTiming | None] = {}
        self._arrived = threading.Condition()

    def deliver(self, requests: Sequence[AnyRequest], answers: Sequence[Answer], timing: BatchTiming | None) -> None:
        with self._arrived:
            for request, answer in zip(requests, answers, strict=True):
                self.answers.setdefault(request.call, []).append(answer)
                self.timings[request.call] = timing
            self._arrived.notify_all()

    def wait(self, requests: Sequence[AnyRequest], seconds: float = 60.0) -> list[Answer]:
        """The answers to these requests. Each must have come exactly once."""
        with self._arrived:
            there = self._arrived.wait_for(lambda: all(r.call in self.answers for r in requests), seconds)
            assert there, f"{sum(r.call not in self.answers for r in requests)} of {len(requests)} got no answer"
            found = [self.answers[r.call] for r in requests]
        assert all(len(f) == 1 for f in found), "a request was answered twice"
        return [f[0] for f in found]

    def errors(self, requests: Sequence[AnyRequest]) -> list[RequestError | None]:
        return [a if isinstance(a, RequestError) else None for a in self.wait(requests)]
