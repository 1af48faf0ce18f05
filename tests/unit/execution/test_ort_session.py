"""One network on ONNX Runtime: every datatype through it, and its errors as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.service import models
from tests.unit.made import session

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, ModelError, RunFailed, TooLarge
from forwardpass.execution.ort_session import OrtSession, new_run_options, translate
from forwardpass.execution.providers import place


@pytest.mark.parametrize("name", models.ELEMENTS)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_every_datatype_goes_through_unchanged(tmp_path: Path, name: str, rows: int) -> None:
    s = session(models.echo(models.ELEMENTS[name]), tmp_path)
    datatype = protocol.DATATYPES[name]
    assert [t.datatype for t in (*s.signature.inputs, *s.signature.outputs)] == [datatype] * 2
    if datatype.numpy is None:
        x = np.array([["", "é\0"]] * rows, object).reshape(rows, 2)
    else:
        x = np.frombuffer(bytes(range(1, 1 + 2 * rows * datatype.itemsize)), datatype.numpy).reshape(rows, 2)
        if name == "BOOL":
            x = x.view(np.uint8) % 2 == 1
    x.flags.writeable = False  # as arrays over a message are
    (y,) = s.run([x], (0,))
    assert y.dtype == x.dtype and y.shape == x.shape
    assert y.tolist() == x.tolist() if datatype.numpy is None else y.tobytes() == x.tobytes()


def _with_bfloat16(name: str, element: int) -> onnx.ModelProto:
    """narrow = b + f in bfloat16, sum = the same in float32; a third tensor, of some element type, is passed on."""
    b, f = ("b", TensorProto.BFLOAT16, ["batch", 2]), ("f", TensorProto.FLOAT, ["batch", 2])
    return models.network(
        [
            helper.make_node("Cast", ["b"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["wide", "f"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["narrow"], to=TensorProto.BFLOAT16),
            helper.make_node("Identity", [name], [f"{name}_out"]),
        ],
        [b, f, (name, element, ["batch", 1])],
        [
            ("narrow", TensorProto.BFLOAT16, ["batch", 2]),
            ("sum", TensorProto.FLOAT, ["batch", 2]),
            (f"{name}_out", element, ["batch", 1]),
        ],
    )


def test_bfloat16_stands_beside_other_types(tmp_path: Path) -> None:
    s = session(_with_bfloat16("n", TensorProto.INT64), tmp_path)
    values = np.array([[1.0, -2.5], [0.5, 1e30]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    ones, numbers = np.ones((2, 2), np.float32), np.array([[7], [8]])
    narrow, total, n_out = s.run([bits, ones, numbers], (0, 1, 2))
    assert np.array_equal(total, wide + 1) and np.array_equal(n_out, numbers)
    assert np.array_equal((narrow.astype(np.uint32) << 16).view(np.float32), wide + 1)
    # Rows in the middle of a larger array, as a slice of an oversized request is.
    (narrow,) = s.run([np.concatenate([bits, bits])[1:3], ones, numbers], (0,))
    assert np.array_equal((narrow.astype(np.uint32) << 16).view(np.float32), wide[::-1] + 1)


def test_bfloat16_and_text_in_one_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="BF16 and BYTES"):
        session(_with_bfloat16("s", TensorProto.STRING), tmp_path)


def test_only_the_outputs_asked_for_come_in_the_order_asked(tmp_path: Path) -> None:
    s = session(models.two_by_two(), tmp_path)
    a, n = np.array([[1, 2, 3]], np.float32), np.array([[10]], np.int64)
    n_out, total = s.run([a, n], (2, 0))
    assert n_out.tolist() == [[10]] and total.tolist() == [[11, 12, 13]]
    (most,) = s.run([a, n], (1,))
    assert most.tolist() == [3]


@pytest.mark.parametrize(
    ("shape", "batchable"), [(("batch", 2), True), ((4, 2), False), (("batch", "width"), True), ((), False)]
)
def test_the_interface_is_read_from_the_file(tmp_path: Path, shape: tuple[Any, ...], batchable: bool) -> None:
    found = session(models.echo(shape=shape), tmp_path).signature
    assert found.batchable is batchable
    assert found.inputs[0].shape == tuple(-1 if isinstance(s, str) else s for s in shape)
    assert (found.inputs[0].name, found.outputs[0].name) == ("x", "y")


def test_a_network_without_inputs_is_no_batch(tmp_path: Path) -> None:
    model = models.network(
        [helper.make_node("Identity", ["c"], ["y"])],
        [],
        [("y", TensorProto.FLOAT, ["n"])],
        {"c": np.ones(3, np.float32)},
    )
    s = session(model, tmp_path)
    assert not s.signature.batchable
    assert s.run([], (0,))[0].tolist() == [1, 1, 1]


def test_values_that_the_network_rejects_are_the_clients_fault(tmp_path: Path) -> None:
    s = session(models.table(), tmp_path)
    with pytest.raises(InvalidRequest, match=r"indices element out of data bounds, idx=99") as caught:
        s.run([np.array([[99]])], (0,))
    assert "onnxruntime" not in str(caught.value).lower() and ".cc" not in str(caught.value)
    assert s.run([np.array([[-1]])], (0,))[0].tolist() == [[70]]


def _of(op: str, element: int, shapes: tuple[list[Any], list[Any]], **attributes: Any) -> onnx.ModelProto:
    """y = op(a, b): a of an element type, b of int64 or of that type."""
    b = element if op in ("MatMul", "Add", "Concat") else TensorProto.INT64
    result = helper.make_tensor_value_info("y", element, None)
    graph = helper.make_graph(
        [helper.make_node(op, ["a", "b"], ["y"] if op != "TopK" else ["y", "places"], **attributes)],
        "network",
        [helper.make_tensor_value_info("a", element, shapes[0]), helper.make_tensor_value_info("b", b, shapes[1])],
        [result],
    )
    opset = helper.make_opsetid("", models.OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=models.IR_VERSION)


WIDE: Any = np.ones((2, 4), np.float32)
FREE = ["n", "m"]


@pytest.mark.parametrize(
    ("model", "a", "b"),
    [
        (_of("Div", models.INT64, (["n"], ["n"])), np.array([4, 6]), np.array([0, 2])),
        (_of("Mod", models.INT64, (["n"], ["n"])), np.array([4, 6]), np.array([0, 2])),
        (_of("GatherElements", models.FLOAT, (["n", 4], ["n", 1]), axis=1), WIDE, np.array([[9], [0]])),
        (_of("ReverseSequence", models.FLOAT, (["n", 4], ["n"]), batch_axis=0, time_axis=1), WIDE, np.array([9, 1])),
        (_of("TopK", models.FLOAT, (["n", 4], [1])), WIDE, np.array([9])),
        (_of("Reshape", models.FLOAT, (["n", 4], ["k"])), WIDE, np.array([3, 5])),
        (_of("MatMul", models.FLOAT, (FREE, ["k", "l"])), WIDE, WIDE),
        (_of("Add", models.FLOAT, (FREE, ["k", "l"])), WIDE, np.ones((2, 3), np.float32)),
        (_of("Concat", models.FLOAT, (FREE, ["k", "l"]), axis=1), WIDE, np.ones((3, 4), np.float32)),
    ],
    ids=lambda value: value.graph.node[0].op_type if isinstance(value, onnx.ModelProto) else "",
)
def test_values_that_an_operator_refuses_are_the_clients_fault(
    tmp_path: Path, model: onnx.ModelProto, a: Any, b: Any
) -> None:
    s = session(model, tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be run on these values"):
        s.run([a, b], (0,))


def test_text_that_is_no_number_is_the_clients_fault(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=models.FLOAT)
    s = session(models.network([node], [("x", models.STRING, ["n"])], [("y", models.FLOAT, ["n"])]), tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be run on these values"):
        s.run([np.array(["1.5", "much"], object)], (0,))


# No machine has this many bytes of address space, so nothing is really allocated, however generous its memory is.
@pytest.mark.parametrize("elements", [1 << 47, 1 << 60, 1 << 61])
def test_what_no_memory_could_hold_is_too_large(tmp_path: Path, elements: int) -> None:
    s = session(models.allocate(), tmp_path)
    with pytest.raises(TooLarge, match="not enough memory") as caught:
        s.run([np.array([[elements]])], (0,))
    assert caught.value.reason == "out_of_memory"
    assert s.run([np.array([[5]])], (0,))[0].tolist() == [[5]]


def test_a_run_that_is_ended_fails(tmp_path: Path) -> None:
    s = session(models.hold(), tmp_path)
    options = new_run_options()
    options.terminate = True
    with pytest.raises(RunFailed):
        s.run([np.array([[10.0]], np.float32)], (0,), options)


def test_errors_are_one_line_without_internals() -> None:
    kind = type("Fail", (Exception,), {})
    text = "[ONNXRuntimeError] : 1 : FAIL : Status Message: /src/a/b.cc:12 f(int)\n went wrong" + "!" * 999
    error = translate(kind(text))
    assert isinstance(error, RunFailed)
    assert str(error).startswith("the run failed: f(int) went wrong!") and len(str(error)) < 400
    assert isinstance(translate(MemoryError()), TooLarge)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense" * 100, models.chain().SerializeToString()[:-40]], ids=["empty", "corrupt", "truncated"]
)
def test_a_file_that_is_no_network_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx cannot be opened: .{5,}") as caught:
        OrtSession(path, place("cpu", 1, ""))
    assert "\n" not in str(caught.value)


def test_types_that_the_protocol_lacks_are_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )
    opset = helper.make_opsetid("", models.OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=models.IR_VERSION)
    with pytest.raises(ModelError, match=r"output 'y' is of type seq\(tensor\(float\)\), which the protocol cannot"):
        session(model, tmp_path)
