"""ModelInfer messages as they go over the wire, and how to read what comes back. No sockets, no processes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass import protocol

PREFIX = struct.Struct(">BI")  # gRPC's frame: compressed or not, length in bytes


def request(
    model: str, rows: NDArray[np.float32], name: str = "x", timeout_us: int = 0, id: str = "", typed: bool = False
) -> bytes:
    """A serialised ModelInferRequest with one FP32 input `rows` [B, D_in], as raw contents or in fp32_contents."""
    message = protocol.ModelInferRequest(model_name=model, id=id)
    tensor = message.inputs.add(name=name, datatype="FP32", shape=rows.shape)
    assert tensor is not None
    if timeout_us:
        message.parameters["timeout"].int64_param = timeout_us
    if typed:
        tensor.contents.fp32_contents.extend(rows.ravel().tolist())
    else:
        message.raw_input_contents.append(np.ascontiguousarray(rows, "<f4").tobytes())
    serialised: bytes = message.SerializeToString()
    return serialised


def framed(message: bytes) -> bytes:
    """A message with gRPC's five bytes before it: an HTTP/2 body."""
    return PREFIX.pack(0, len(message)) + message


def answer(message: bytes) -> NDArray[np.float32]:
    """The one FP32 output [B, D_out] of a serialised ModelInferResponse."""
    response: Any = protocol.ModelInferResponse()
    response.ParseFromString(message)
    (raw,) = response.raw_output_contents
    return np.frombuffer(raw, "<f4").reshape(tuple(response.outputs[0].shape))
