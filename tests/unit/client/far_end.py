"""The far end of a conversation with a client, in this process: the server's own decoder and reply writer, no channel.

Models are functions of their rows so simple that a test can say what must come back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from forwardpass import protocol
from forwardpass.batching.request import QueueLimits, WorkerOptions
from forwardpass.client.errors import CallError, Internal, InvalidArgument
from forwardpass.client.operations import Call, Reply, Steps
from forwardpass.errors import RequestError
from forwardpass.inference.decoder import Decoder
from forwardpass.inference.encoder import encode_plain
from forwardpass.model.signature import ModelSignature, TensorSpec

FP32, INT64, BYTES = (protocol.DATATYPES[name] for name in ("FP32", "INT64", "BYTES"))
ROWS = TensorSpec("x", FP32, (-1, 4))
SUMS = TensorSpec("y", FP32, (-1, 2), labels=("low", "high"))
ONE = ModelSignature((ROWS,), (SUMS,), batchable=True)
POISON = -777.0
TWO = ModelSignature((ROWS, TensorSpec("ids", INT64, (-1,))), (SUMS, TensorSpec("names", BYTES, (-1,))), batchable=True)


class Far:
    """A server of one model, y = (least, largest) of a row, that keeps what was asked of it. POISON fails a request."""

    generation = 0
    options = WorkerOptions(QueueLimits(), max_request_rows=100, priority_levels=5)

    def __init__(self, signature: ModelSignature, version: str = "1") -> None:
        self.name, self.version, self.signature = "m", version, signature
        self.asked: list[str] = []
        self.requests: list[Any] = []
        self.rows: list[int] = []  # of each request that was run
        self.max_batch_size = 64
        self.trailing: list[tuple[str, str | bytes]] = []

    def resolve(self, _name: str, _version: str) -> Far:
        return self

    def hear(self, call: Call) -> Reply:
        method = call.path.rpartition("/")[2]
        self.asked.append(method)
        if method == "ModelMetadata":
            return Reply(self.metadata(), ())
        request = protocol.ModelInferRequest.FromString(call.request)
        self.requests.append(request)
        decoder = Decoder(self, 1 << 20)
        try:
            # Twice: the second time by what the decoder remembers of the first.
            decoder.decode(call.request)
            template, buffers, id_field = decoder.decode(call.request)
        except RequestError as error:
            raise InvalidArgument(str(error)) from None
        dtype = self.signature.inputs[0].datatype.numpy
        x = np.frombuffer(b"".join(map(bytes, buffers[:1])), dtype).reshape(template.batch_shapes[0])
        self.rows.append(len(x))
        if (x == POISON).any():
            raise Internal("the network cannot be run on these values")
        results: list[np.ndarray] = [
            np.stack([x.min(1), x.max(1)], 1).astype(np.float32),
            np.array(["a"] * len(x), object),
        ]
        results = [results[place] for place in template.outputs]
        return Reply(encode_plain(template, id_field, results), self.trailing)

    def metadata(self) -> bytes:
        response = protocol.ModelMetadataResponse(name="m", versions=[self.version], platform="onnxruntime_onnx")
        for tensor, said in [
            *((t, response.inputs.add()) for t in self.signature.inputs),
            *((t, response.outputs.add()) for t in self.signature.outputs),
        ]:
            said.name, said.datatype = tensor.name, tensor.datatype.name
            said.shape.extend(tensor.shape)
            if tensor.labels:
                said.parameters["labels"].string_param = str(list(tensor.labels)).replace("'", '"')
        response.parameters["max_batch_size"].int64_param = self.max_batch_size
        response.parameters["contract"].bool_param = True
        return bytes(response.SerializeToString())


def drive(steps: Steps[Any], hear: Callable[[Call], Reply]) -> Any:
    """What comes of the steps of an operation, each call of which is answered by `hear`."""
    try:
        call = next(steps)
        while True:
            try:
                reply = hear(call)
            except CallError as error:
                call = steps.throw(error)
            else:
                call = steps.send(reply)
    except StopIteration as stop:
        return stop.value
