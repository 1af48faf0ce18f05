"""A client's operations without a channel: building requests, reading responses, remembering models.

Each operation is a generator that yields a `Call`, is sent the `Reply` (or has a CallError thrown in), and returns the
operation's result. The clients run them over a blocking or an asyncio channel, so both share the code here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forwardpass import protocol
from forwardpass.client.arrays import TensorInfo, fit, to_raw
from forwardpass.client.errors import CallError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from forwardpass.client.options import INFER, SUBMIT, InferOptions, SubmitOptions, filled
from forwardpass.client.results import (
    Answer,
    ModelInfo,
    ModelList,
    ModelState,
    Parameter,
    ServerInfo,
    Template,
    answer_of,
    names,
    parse,
    read_answer,
    read_info,
)
from forwardpass.client.tables import arrays_of, coded, columns_in, is_array
from forwardpass.protocol.timings import TIMINGS_KEY, read_timings
from forwardpass.protocol.wire import RAW_IN, varint

Inputs = Mapping[str, ArrayLike] | Sequence[Mapping[str, object]] | ArrayLike  # arrays by name; a table; an array

_INFER = protocol.METHODS["ModelInfer"].path
_ID = b"\x1a"  # tag of ModelInferRequest.id (field 3, length-delimited)
_ASK_TIMINGS = ((TIMINGS_KEY, "1"),)
REMEMBERED = 4096  # models, and kinds of requests
_CHANGED = (InvalidArgument, NotFound, FailedPrecondition)  # after these the model may have changed
_INT64 = range(-(1 << 63), 1 << 63)


class Call(NamedTuple):
    """One unary call to make."""

    path: str
    request: bytes
    timeout: float | None  # seconds; None: no limit
    metadata: tuple[tuple[str, str], ...] = ()


class Reply(NamedTuple):
    """The response to a Call."""

    message: bytes
    trailing: Iterable[tuple[str, str | bytes]]


class Kind:
    """Requests that are equal except for id and tensor bytes, and the template of the last response to one."""

    __slots__ = ("answered", "head")

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.answered: Template | None = None


class Plain(NamedTuple):
    """The fast path for arrays of one shape and dtype that need no conversion: send their bytes after `head`."""

    head: bytes  # up to and including the length of the only tensor
    kind: Kind
    info: ModelInfo
    one_row: bool  # the array is a row without the batch axis


T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")
Fitted = list[tuple[TensorInfo, NDArray[Any]]]
Built = tuple[Kind, bytes]
Steps = Generator[Call, Reply, T]


class Operations:
    """Every operation of a client. Remembers the models' metadata; may be used from many threads.

    - A model's metadata is fetched once and kept until the server rejects a request, or another version answers.
    - A request built on remembered metadata and rejected is built again, once, if the metadata has changed.
    - A request without its id and tensors is the same from call to call: it is built once and kept too.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._infos: dict[tuple[str, str], ModelInfo] = {}
        self._kinds: dict[Any, Kind] = {}
        self._plain: dict[Any, Plain] = {}
        self.forgotten = 0  # how often a model's metadata were forgotten

    def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Steps[Answer]:
        chosen = filled(INFER, options)
        wanted = _outputs(chosen)
        version = chosen["version"]

        def build(info: ModelInfo) -> Built:
            return self._request(_fitted(info, inputs), model, wanted, chosen)

        return (yield from self._exchange(model, version, build, chosen["timeout"], chosen["timings"]))

    def predict(
        self, model: str, x: Inputs, *, output: str | None, version: str, timeout: float | None, priority: int
    ) -> Steps[NDArray[Any]]:
        if not is_array(x):
            wanted = None if output is None else (output,)
            table = yield from self.infer(model, x, outputs=wanted, version=version, timeout=timeout, priority=priority)
            return table.only()
        array = x if type(x) is np.ndarray else np.asarray(x)
        like = (model, version, output, priority, array.shape, array.dtype)
        plain = self._plain.get(like)
        if plain is not None:
            try:
                reply = yield Call(_INFER, plain.head + array.tobytes(), self.limit(timeout))
            except _CHANGED:
                self._forget(model, version)
            else:
                known = plain.kind.answered
                result = None if known is None else known.tensor_of(reply.message)
                if result is None:
                    result = self._read(reply, plain.kind, plain.info, model, version, False).only()
                return _row(result) if plain.one_row else result

        outputs = () if output is None else (output,)
        chosen: SubmitOptions = {**SUBMIT, "version": version, "priority": priority}

        def build(info: ModelInfo) -> Built:
            nonlocal plain
            tensor = info.only_input()
            one_row = array.ndim == len(tensor.shape) - 1
            rows = array[np.newaxis] if one_row else array
            sent = fit(rows, tensor)
            kind, request = self._request([(tensor, sent)], model, outputs, chosen)
            as_it_is = sent is rows and array.nbytes and array.dtype.kind not in "OUS"
            plain = Plain(request[: -array.nbytes] if as_it_is else b"", kind, info, one_row)
            return kind, request

        answer = yield from self._exchange(model, version, build, timeout, False)
        assert plain is not None
        if plain.head and self._infos.get((model, version)) is plain.info:
            remember(self._plain, like, plain)
        return _row(answer.only()) if plain.one_row else answer.only()

    def streamed(
        self, wire_id: str, model: str, inputs: Inputs, options: SubmitOptions
    ) -> Steps[tuple[bytes, ModelInfo]]:
        """A request for a stream, and the metadata it is built on. `timeout` is sent as a parameter."""
        parameters = dict(options["parameters"] or {})
        timeout = options["timeout"]
        if timeout is not None and timeout != math.inf:
            parameters["timeout"] = max(1, round(timeout * 1e6))
        info = yield from self.known(model, options["version"], None)
        sent: SubmitOptions = {**options, "id": wire_id, "parameters": parameters}
        _, request = self._request(_fitted(info, inputs), model, _outputs(options), sent)
        return request, info

    def heard(self, response: Any, info: ModelInfo, model: str, version: str, id: str) -> Answer:
        """The answer in a ModelInferResponse received on a stream."""
        answer = answer_of(response, info, None, id)
        if info.versions and answer.version not in info.versions:
            self._forget(model, version)
        return answer

    def refused(self, error: CallError, model: str, version: str) -> None:
        """Handle a failed request on a stream: after some errors the model may have changed."""
        if isinstance(error, _CHANGED):
            self._forget(model, version)

    def metadata(self, model: str, *, version: str, timeout: float | None) -> Steps[ModelInfo]:
        request = protocol.ModelMetadataRequest(name=model, version=version)
        response = yield from self.ask("ModelMetadata", request, timeout)
        info = read_info(response)
        remember(self._infos, (model, version), info)
        return info

    def known(self, model: str, version: str, timeout: float | None) -> Steps[ModelInfo]:
        """A model's metadata, requested only if they are not remembered."""
        remembered = self._infos.get((model, version))
        return remembered or (yield from self.metadata(model, version=version, timeout=timeout))

    def models(self, *, ready: bool, timeout: float | None) -> Steps[list[ModelState]]:
        response = yield from self.ask("RepositoryIndex", protocol.RepositoryIndexRequest(ready=ready), timeout)
        return ModelList(ModelState(model.name, model.version, model.state, model.reason) for model in response.models)

    def server(self, *, timeout: float | None) -> Steps[ServerInfo]:
        response = yield from self.ask("ServerMetadata", protocol.ServerMetadataRequest(), timeout)
        return ServerInfo(response.name, response.version, tuple(response.extensions))

    def live(self, *, timeout: float | None) -> Steps[bool]:
        try:
            response = yield from self.ask("ServerLive", protocol.ServerLiveRequest(), timeout)
        except Unavailable:
            return False
        return bool(response.live)

    def ready(self, model: str | None, *, version: str, timeout: float | None) -> Steps[bool]:
        try:
            if model is None:
                response = yield from self.ask("ServerReady", protocol.ServerReadyRequest(), timeout)
            else:
                request = protocol.ModelReadyRequest(name=model, version=version)
                response = yield from self.ask("ModelReady", request, timeout)
        except Unavailable:
            return False
        return bool(response.ready)

    def _exchange(
        self, model: str, version: str, build: Callable[[ModelInfo], Built], timeout: float | None, timings: bool
    ) -> Steps[Answer]:
        """The answer to the request that `build` makes from the model's metadata."""
        remembered = self._infos.get((model, version))
        info = remembered or (yield from self.metadata(model, version=version, timeout=timeout))
        while True:
            try:
                kind, request = build(info)
                reply = yield Call(_INFER, request, self.limit(timeout), _ASK_TIMINGS if timings else ())
                break
            except _CHANGED:
                self._forget(model, version)
                if remembered is None:
                    raise
                info = yield from self.metadata(model, version=version, timeout=timeout)
                if info == remembered:
                    raise
                remembered = None
        return self._read(reply, kind, info, model, version, timings)

    def _read(self, reply: Reply, kind: Kind, info: ModelInfo, model: str, version: str, timings: bool) -> Answer:
        told = read_timings(reply.trailing) if timings else None
        answer, kind.answered = read_answer(reply.message, info, told, kind.answered)
        if info.versions and answer.version not in info.versions:
            # Another version serves by now: its inputs and outputs may differ.
            self._forget(model, version)
        return answer

    def _forget(self, model: str, version: str) -> None:
        self._infos.pop((model, version), None)
        self._plain.clear()
        self.forgotten += 1

    def ask(self, method: str, request: Any, timeout: float | None) -> Steps[Any]:
        """The parsed response of a method that takes one message."""
        called = protocol.METHODS[method]
        reply = yield Call(called.path, request.SerializeToString(), self.limit(timeout))
        return parse(called.response, reply.message)

    def limit(self, timeout: float | None) -> float | None:
        """The time limit in seconds of a call with this `timeout`; None: no limit."""
        limit = self._timeout if timeout is None else timeout
        return None if limit == math.inf else limit

    def _request(self, given: Fitted, model: str, outputs: tuple[str, ...], options: SubmitOptions) -> Built:
        """A ModelInferRequest with its tensor bytes last; with `outputs` in place of those in `options`."""
        version, priority = options["version"], options["priority"]
        parameters, id = options["parameters"], options["id"]
        key = (model, version, outputs, priority, *[(t.name, t.datatype, array.shape) for t, array in given])
        kind = None if parameters else self._kinds.get(key)
        if kind is None:
            kind = Kind(_head(given, model, version, outputs, priority, parameters or {}))
            if not parameters:
                remember(self._kinds, key, kind)
        parts = [kind.head]
        if id:
            text = id.encode()
            parts += (_ID, varint(len(text)), text)
        for tensor, array in given:
            raw = to_raw(array, tensor.name)
            parts += (RAW_IN, varint(len(raw)), raw)
        return kind, b"".join(parts)


def remember(known: dict[K, V], key: K, value: V) -> None:
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = value


def _outputs(options: SubmitOptions) -> tuple[str, ...]:
    outputs = options["outputs"]
    return (outputs,) if isinstance(outputs, str) else tuple(outputs or ())


def _row(result: NDArray[Any]) -> NDArray[Any]:
    """The only row of [1, ...] as [...]; any other array as it is."""
    return result.reshape(result.shape[1:]) if result.shape[:1] == (1,) else result


def _fitted(info: ModelInfo, inputs: Any) -> Fitted:
    columns = None if type(inputs) is np.ndarray else columns_in(inputs, info.inputs)
    if columns is not None:
        arrays = arrays_of(columns, info.name, info.inputs)
        return [(info.input_named[name], array) for name, array in arrays.items()]
    if isinstance(inputs, np.ndarray) or not isinstance(inputs, Mapping):
        only = info.only_input()
        return [(only, fit(np.asarray(inputs), only))]
    fitted = []
    for name, value in inputs.items():
        tensor = info.input_named.get(name)
        if tensor is None:
            raise InvalidArgument(f"model '{info.name}' has no input '{name}'; expected {names(info.inputs)}")
        array = np.asarray(value)
        words = bool(tensor.categories) and array.dtype.kind in "OUS"
        fitted.append((tensor, coded(array, tensor, f"input '{name}'") if words else fit(array, tensor)))
    return fitted


def _head(
    given: Fitted,
    model: str,
    version: str,
    outputs: tuple[str, ...],
    priority: int,
    parameters: Mapping[str, Parameter],
) -> bytes:
    """A ModelInferRequest without its id and its tensor bytes."""
    request = protocol.ModelInferRequest(model_name=model, model_version=version)
    for tensor, array in given:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
    for name in outputs:
        request.outputs.add(name=name)
    if priority:
        request.parameters["priority"].uint64_param = priority
    for key, value in parameters.items():
        parameter = request.parameters[key]
        match value:
            case bool():
                parameter.bool_param = value
            case int() if value in _INT64:
                parameter.int64_param = value
            case int():
                parameter.uint64_param = value
            case float():
                parameter.double_param = value
            case _:
                parameter.string_param = value
    return bytes(request.SerializeToString())
