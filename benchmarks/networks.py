"""A network of a chosen weight, for the checks that need a slow model: built, not trained. Needs the package onnx."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bodies import request
from openloop import Body

WIDTH_IN, WIDTH_OUT = 64, 10


def build(path: Path, width: int, layers: int) -> None:
    """Write an ONNX MLP x [batch, 64] -> `layers` hidden layers of `width` with ReLU -> y [batch, 10]. FP32."""
    generator = np.random.default_rng(0)
    widths = [WIDTH_IN, *[width] * layers, WIDTH_OUT]
    nodes, weights = [], []
    last = "x"
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        w = generator.normal(0, (2 / before) ** 0.5, (after, before)).astype(np.float32)
        b = generator.normal(0, 0.1, after).astype(np.float32)
        weights += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(b, f"b{i}")]
        z = "y" if i == layers else f"z{i}"
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [z], transB=1))
        if i < layers:
            nodes.append(helper.make_node("Relu", [z], [f"a{i}"]))
            last = f"a{i}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH_IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH_OUT])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def repository(folder: Path, name: str, width: int, layers: int, options: str) -> Path:
    """A repository in `folder` with one such network as `name`, version 1, and `options` as its model.toml."""
    build(folder / name / "1" / "model.onnx", width, layers)
    (folder / name / "model.toml").write_text(options)
    return folder


def bodies(folder: Path, name: str, count: int) -> list[Body]:
    """`count` distinct requests of one row, with what ONNX Runtime answers to each alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = folder / name / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(1).normal(0, 1, (count, WIDTH_IN)).astype(np.float32)
    return [Body(request(name, row[None]), session.run(None, {"x": row[None]})[0].tobytes()) for row in rows]
