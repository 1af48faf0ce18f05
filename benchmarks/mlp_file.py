"""Writes an MLP as an ONNX file with nothing but numpy: a GPU host that has PyTorch and ONNX Runtime seldom has onnx.

Only what such a file needs of the format (protocol buffers, fields by number as in onnx.proto); a test holds it against
onnx's own checker.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IR_VERSION, OPSET = 9, 20
FLOAT, FLOAT16 = 1, 10  # TensorProto.DataType
INT_ATTRIBUTE = 2  # AttributeProto.AttributeType

Layer = tuple[NDArray[np.float32], NDArray[np.float32]]  # W [out, in], b [out]


def layers(widths: Sequence[int], seed: int = 0) -> list[Layer]:
    """Random layers that keep activations at about the size of the inputs."""
    generator = np.random.default_rng(seed)
    return [
        (
            generator.standard_normal((after, before), np.float32) * np.float32((2 / before) ** 0.5),
            generator.standard_normal(after, np.float32) * np.float32(0.1),
        )
        for before, after in itertools.pairwise(widths)
    ]


def write(path: Path, network: Sequence[Layer], half: bool = False) -> None:
    """x FP32 [batch, in] -> layers with ReLU between them -> y FP32 [batch, out].

    `half`: weights and activations in FP16, with casts after x and before y, as `export --precision fp16` has it.
    """
    element, dtype = (FLOAT16, np.dtype("<f2")) if half else (FLOAT, np.dtype("<f4"))
    nodes, tensors = [], []
    last = "x"
    if half:
        nodes.append(_node("Cast", ["x"], "h", to=FLOAT16))
        last = "h"
    for i, (w, b) in enumerate(network):
        tensors += [_tensor(f"w{i}", w.astype(dtype), element), _tensor(f"b{i}", b.astype(dtype), element)]
        is_last = i == len(network) - 1
        z = "y" if is_last and not half else f"z{i}"
        nodes.append(_node("Gemm", [last, f"w{i}", f"b{i}"], z, transB=1))
        last = z
        if not is_last:
            nodes.append(_node("Relu", [z], f"a{i}"))
            last = f"a{i}"
    if half:
        nodes.append(_node("Cast", [last], "y", to=FLOAT))
    graph = b"".join(
        [
            *(_message(1, node) for node in nodes),
            _text(2, "mlp"),
            *(_message(5, tensor) for tensor in tensors),
            _message(11, _value("x", network[0][0].shape[1])),
            _message(12, _value("y", network[-1][0].shape[0])),
        ]
    )
    model = _number(1, IR_VERSION) + _message(7, graph) + _message(8, _text(1, "") + _number(2, OPSET))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model)


def _node(operator: str, inputs: Sequence[str], output: str, **integers: int) -> bytes:
    attributes = [
        _message(5, _text(1, name) + _number(3, value) + _number(20, INT_ATTRIBUTE)) for name, value in integers.items()
    ]
    return b"".join([*(_text(1, name) for name in inputs), _text(2, output), _text(4, operator), *attributes])


def _tensor(name: str, array: NDArray[np.floating], element: int) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, element) + _text(8, name) + _message(9, array.tobytes())


def _value(name: str, width: int) -> bytes:
    """FP32 [batch, width]."""
    shape = _message(1, _text(2, "batch")) + _message(1, _number(1, width))
    return _text(1, name) + _message(2, _message(1, _number(1, FLOAT) + _message(2, shape)))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
