"""Small ONNX networks, each made for one thing that a server must get right, and how they are put into a repository.

They are built node by node, so that a test can say exactly what a network does with the rows it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract, Samples, Tolerance, file_digest
from forwardpass.model.contract_tensor import ContractTensor

OPSET = 17
IR_VERSION = 9  # what every ONNX Runtime that we support can read

FLOAT, INT64, STRING, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL

# The protocol's datatypes by ONNX's element type.
ELEMENTS = {
    "BOOL": BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": STRING,
    "BF16": TensorProto.BFLOAT16,
}

Spec = tuple[str, int, Sequence[int | str]]  # name, element type, shape; a word is an axis of any size


def network(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Spec],
    outputs: Sequence[Spec],
    constants: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    """A checked network of these nodes."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(*spec) for spec in inputs],
        [helper.make_tensor_value_info(*spec) for spec in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def save(repository: Path, name: str, model: onnx.ModelProto, options: str = "", version: int = 1) -> Path:
    """Put a network into a repository, with the text of its model.toml; the version's folder."""
    folder = repository / name / str(version)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    if options:
        (repository / name / "model.toml").write_text(options)
    return folder


def chain(sizes: Sequence[int] = (4, 8, 3), seed: int = 0) -> onnx.ModelProto:
    """Gemm, Relu, Gemm ...: x FP32 [B, sizes[0]] -> y FP32 [B, sizes[-1]]."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Any] = {}
    flow = "x"
    for i, (wide, narrow) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        constants[f"w{i}"] = (rng.standard_normal((narrow, wide)) / np.sqrt(wide)).astype(np.float32)
        constants[f"b{i}"] = rng.standard_normal(narrow).astype(np.float32)
        out = "y" if last else f"z{i}"
        nodes.append(helper.make_node("Gemm", [flow, f"w{i}", f"b{i}"], [out], transB=1))
        if not last:
            nodes.append(helper.make_node("Relu", [out], [f"a{i}"]))
            flow = f"a{i}"
    return network(nodes, [("x", FLOAT, ["batch", sizes[0]])], [("y", FLOAT, ["batch", sizes[-1]])], constants)


def echo(element: int = FLOAT, shape: Sequence[int | str] = ("batch", 2)) -> onnx.ModelProto:
    """y = x, of one element type and any shape."""
    return network([helper.make_node("Identity", ["x"], ["y"])], [("x", element, shape)], [("y", element, shape)])


def relu_any_width() -> onnx.ModelProto:
    """y = max(x, 0), FP32 [B, any]: requests of different widths cannot share a matrix."""
    shape = ("batch", "width")
    return network([helper.make_node("Relu", ["x"], ["y"])], [("x", FLOAT, shape)], [("y", FLOAT, shape)])


def cars(repository: Path) -> Path:
    """The model `cars` with its contract: of a table's columns weight, power, origin (a category) and name (text) it
    makes `logits` [B, 3], weight and power by a matrix plus a row for each origin, and `seen`, the name."""
    made = network(
        [
            helper.make_node("MatMul", ["numbers", "w"], ["a"]),
            helper.make_node("Gather", ["t", "origin"], ["b"], axis=0),
            helper.make_node("Add", ["a", "b"], ["logits"]),
            helper.make_node("Identity", ["name"], ["seen"]),
        ],
        [("numbers", FLOAT, ["batch", 2]), ("origin", INT64, ["batch"]), ("name", STRING, ["batch", 1])],
        [("logits", FLOAT, ["batch", 3]), ("seen", STRING, ["batch", 1])],
        {"w": np.array([[1, 0, -1], [0, 1, 0]], np.float32), "t": np.array([[0, 0, 0], [0, 0, 5]], np.float32)},
    )
    folder = save(repository, "cars", made)
    given = {
        "numbers": np.array([[1, 2], [0.5, 0.25]], np.float32),
        "origin": np.array([0, 1]),
        "name": np.array([["golf"], ["mustang"]], object),
    }
    inputs = [
        ContractTensor(name="numbers", datatype="FP32", shape=[-1, 2], labels=["weight", "power"]),
        ContractTensor(name="origin", datatype="INT64", shape=[-1], categories=["USA", "Europe"]),
        ContractTensor(name="name", datatype="BYTES", shape=[-1, 1]),
    ]
    outputs = [
        ContractTensor(name="logits", datatype="FP32", shape=[-1, 3], labels=["low", "middle", "high"]),
        ContractTensor(name="seen", datatype="BYTES", shape=[-1, 1]),
    ]
    add_contract(folder, given, True, inputs=inputs, outputs=outputs)
    return folder


def table(rows: int = 8) -> onnx.ModelProto:
    """y[i] = 10 * x[i], looked up: x INT64 [B, 1] in -rows..rows-1. Any other value fails the whole run."""
    return network(
        [helper.make_node("Gather", ["t", "x"], ["y"], axis=0)],
        [("x", INT64, ["batch", 1])],
        [("y", FLOAT, ["batch", 1])],
        {"t": np.arange(rows, dtype=np.float32) * 10},
    )


def hold() -> onnx.ModelProto:
    """y = x, FP32 [B, 1], after as many turns of a loop as the largest x says: rows are independent, time is not.

    A turn takes about a microsecond, and a run can be ended from outside between two turns.
    """
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still_going"]),
            helper.make_node("Add", ["v", "one"], ["v_next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", INT64, []),
            helper.make_tensor_value_info("going", BOOL, []),
            helper.make_tensor_value_info("v", FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("still_going", BOOL, []),
            helper.make_tensor_value_info("v_next", FLOAT, []),
        ],
    )
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["all"]),
        helper.make_node("Concat", ["all", "nothing"], ["some"], axis=0),  # so that no rows are no turns
        helper.make_node("ReduceMax", ["some"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["turns"], to=INT64),
        helper.make_node("Loop", ["turns", "", "start"], ["v_end"], body=body),
        helper.make_node("Min", ["v_end", "start"], ["zero"]),
        helper.make_node("Add", ["x", "zero"], ["y"]),
    ]
    constants = {
        "flat": np.array([-1], np.int64),
        "nothing": np.zeros(1, np.float32),
        "start": np.array(0, np.float32),
        "one": np.array(1, np.float32),
    }
    return network(nodes, [("x", FLOAT, ["batch", 1])], [("y", FLOAT, ["batch", 1])], constants)


def allocate() -> onnx.ModelProto:
    """y = x, INT64 [B, 1], by way of a tensor of as many 8-byte elements as the largest x says."""
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["all"]),
        helper.make_node("Concat", ["all", "nothing"], ["some"], axis=0),
        helper.make_node("ReduceMax", ["some"], ["most"], axes=[0], keepdims=1),
        helper.make_node(
            "ConstantOfShape", ["most"], ["big"], value=numpy_helper.from_array(np.zeros(1, np.int64), "value")
        ),
        helper.make_node("ReduceSum", ["big", "axis"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["y"]),
    ]
    constants = {
        "flat": np.array([-1], np.int64),
        "nothing": np.zeros(1, np.int64),
        "axis": np.array([0], np.int64),
    }
    return network(nodes, [("x", INT64, ["batch", 1])], [("y", INT64, ["batch", 1])], constants)


def centred() -> onnx.ModelProto:
    """y = x - mean of the batch: every row's answer depends on its neighbours. FP32 [B, 3]."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    return network(nodes, [("x", FLOAT, ["batch", 3])], [("y", FLOAT, ["batch", 3])])


def running_sum() -> onnx.ModelProto:
    """y = the sum of this row and those before it. FP32 [B, 3]."""
    return network(
        [helper.make_node("CumSum", ["x", "axis"], ["y"])],
        [("x", FLOAT, ["batch", 3])],
        [("y", FLOAT, ["batch", 3])],
        {"axis": np.array(0, np.int64)},
    )


def quantised(seed: int = 0) -> onnx.ModelProto:
    """x FP32 [B, 16] times an int8 matrix, x quantised at run time by the range of the whole batch: y FP32 [B, 4]."""
    weights = np.random.default_rng(seed).integers(-127, 128, (16, 4)).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero_point"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero_point"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["y"]),
    ]
    return network(nodes, [("x", FLOAT, ["batch", 16])], [("y", FLOAT, ["batch", 4])], {"w": weights})


def neighbourly(least: float) -> onnx.ModelProto:
    """y = x + 1 where the first row has more than `least`, else x. FP32 [B, 3]. Infinity: never.

    The proof does not follow rows that are taken by their places, so that running it has to show.
    """
    nodes = [
        helper.make_node("Gather", ["x", "place"], ["first"], axis=0),
        helper.make_node("Greater", ["first", "least"], ["more"]),
        helper.make_node("Cast", ["more"], ["one"], to=FLOAT),
        helper.make_node("Add", ["x", "one"], ["y"]),
    ]
    constants = {"least": np.full(3, least, np.float32), "place": np.array(0, np.int64)}
    return network(nodes, [("x", FLOAT, ["batch", 3])], [("y", FLOAT, ["batch", 3])], constants)


def twice_the_rows() -> onnx.ModelProto:
    """y = x above x, FP32 [2 B, 3]: axis 0 is of any size, and yet no batch."""
    return network(
        [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)],
        [("x", FLOAT, ["batch", 3])],
        [("y", FLOAT, ["rows", 3])],
    )


def two_by_two() -> onnx.ModelProto:
    """a FP32 [B, 3], n INT64 [B, 1] -> sum = a + n FP32 [B, 3], most = largest of a row FP32 [B], n_out = n."""
    nodes = [
        helper.make_node("Cast", ["n"], ["n_float"], to=FLOAT),
        helper.make_node("Add", ["a", "n_float"], ["sum"]),
        helper.make_node("ReduceMax", ["a"], ["most"], axes=[1], keepdims=0),
        helper.make_node("Identity", ["n"], ["n_out"]),
    ]
    return network(
        nodes,
        [("a", FLOAT, ["batch", 3]), ("n", INT64, ["batch", 1])],
        [("sum", FLOAT, ["batch", 3]), ("most", FLOAT, ["batch"]), ("n_out", INT64, ["batch", 1])],
    )


def trimmed() -> onnx.ModelProto:
    """y = the mean of a row's first places, as many as the largest length of the batch: neighbours matter.

    x FP32 [B, 12, 2], lengths INT64 [B] -> y FP32 [B, 2]. Lengths from 12 on are all alike.
    """
    nodes = [
        helper.make_node("ReduceMax", ["lengths"], ["longest"], keepdims=1),
        helper.make_node("Less", ["places", "longest"], ["inside"]),
        helper.make_node("Cast", ["inside"], ["mask"], to=FLOAT),
        helper.make_node("Reshape", ["mask", "by_place"], ["weights"]),
        helper.make_node("Mul", ["x", "weights"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "second"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask"], ["count"], keepdims=1),
        helper.make_node("Max", ["count", "one"], ["at_least_one"]),
        helper.make_node("Div", ["sum", "at_least_one"], ["y"]),
    ]
    constants = {
        "places": np.arange(12),
        "by_place": np.array([1, 12, 1]),
        "second": np.array([1]),
        "one": np.ones(1, np.float32),
    }
    given: list[Spec] = [("x", FLOAT, ["batch", 12, 2]), ("lengths", INT64, ["batch"])]
    return network(nodes, given, [("y", FLOAT, ["batch", 2])], constants)


def capacity(least: int = 8) -> onnx.ModelProto:
    """Two experts by the sign of the first element, each for the first max(`least`, 0.625 B) rows that ask for it.

    x FP32 [B, 2] -> y = 3 x at an expert that has room, else x. FP32 [B, 2].
    """
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["gate"], axis=1),
        helper.make_node("Greater", ["gate", "zero"], ["right"]),
        helper.make_node("Not", ["right"], ["left"]),
        helper.make_node("Concat", ["left", "right"], ["chosen"], axis=1),
        helper.make_node("Cast", ["chosen"], ["expert"], to=FLOAT),
        helper.make_node("CumSum", ["expert", "first_axis"], ["so_far"]),
        helper.make_node("Mul", ["so_far", "expert"], ["by_expert"]),
        helper.make_node("ReduceSum", ["by_expert", "second"], ["place"], keepdims=1),
        helper.make_node("Shape", ["x"], ["rows"], end=1),
        helper.make_node("Cast", ["rows"], ["rows_float"], to=FLOAT),
        helper.make_node("Mul", ["rows_float", "share"], ["fair"]),
        helper.make_node("Max", ["fair", "least"], ["room"]),
        helper.make_node("LessOrEqual", ["place", "room"], ["has_room"]),
        helper.make_node("Mul", ["x", "three"], ["expert_says"]),
        helper.make_node("Where", ["has_room", "expert_says", "x"], ["y"]),
    ]
    constants = {
        "first": np.array([0]),
        "zero": np.zeros(1, np.float32),
        "first_axis": np.array(0),
        "second": np.array([1]),
        "share": np.array([0.625], np.float32),
        "least": np.array([least], np.float32),
        "three": np.array([3], np.float32),
    }
    return network(nodes, [("x", FLOAT, ["batch", 2])], [("y", FLOAT, ["batch", 2])], constants)


def add_contract(folder: Path, given: dict[str, Any], rows_independent: bool | None, **more: Any) -> None:
    """A contract beside a saved network, with samples of `given`: arrays [rows, ...] by input."""
    session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    specs = {"inputs": _specs(session.get_inputs()), "outputs": _specs(session.get_outputs())}
    answers = dict(zip([t.name for t in specs["outputs"]], session.run(None, given), strict=True))
    expected = {name: np.asarray(a, np.float64) if a.dtype.kind == "f" else a for name, a in answers.items()}
    rows = len(next(iter(given.values())))
    fields: dict[str, Any] = {
        "files": {MODEL_FILE: file_digest(folder / MODEL_FILE)},
        "samples": Samples.from_arrays(rows, given, expected),
        "tolerance": Tolerance(rtol=1e-5, atol=1e-6),
        "batch_invariant": rows_independent,
        "rows_independent": rows_independent,
        **specs,
        **more,
    }
    Contract(
        model=folder.parent.name, version=1, batchable=True, opset=OPSET, torch="", onnxruntime=onnxruntime.__version__,
        provider="CPUExecutionProvider", largest_difference=0.0, **fields,
    ).save(folder / CONTRACT_FILE)  # fmt: skip


def _specs(values: Any) -> list[ContractTensor]:
    names = {"tensor(float)": "FP32", "tensor(int64)": "INT64", "tensor(string)": "BYTES"}
    sizes = [[d if isinstance(d, int) else -1 for d in v.shape] for v in values]
    return [ContractTensor(name=v.name, datatype=names[v.type], shape=s) for v, s in zip(values, sizes, strict=True)]
