"""The conversation of a client, driven by hand: the other end is the server's own decoder and reply writer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.unit.client.far_end import ONE, ROWS, SUMS, TWO, Far, drive

from forwardpass import protocol
from forwardpass.client import Answer, Internal, InvalidArgument, ModelInfo, NotFound, Unavailable
from forwardpass.client.operations import Call, Operations, Reply
from forwardpass.model.signature import ModelSignature, TensorSpec


def infer(operations: Operations, far: Far, inputs: Any, **options: Any) -> Answer:
    answer = drive(operations.infer("m", inputs, **options), far.hear)
    assert isinstance(answer, Answer)
    return answer


def predict(operations: Operations, far: Far, x: Any, output: str | None = None) -> np.ndarray:
    got = drive(operations.predict("m", x, output=output, version="", timeout=None, priority=0), far.hear)
    assert isinstance(got, np.ndarray)
    return got


X = np.arange(8, dtype=np.float32).reshape(2, 4)
Y = np.array([[0, 3], [4, 7]], np.float32)


def test_rows_in_rows_out_and_metadata_asked_once() -> None:
    operations, far = Operations(None), Far(ONE)
    for _ in range(3):
        np.testing.assert_array_equal(predict(operations, far, X), Y)
        np.testing.assert_array_equal(predict(operations, far, X[1].astype(np.float64)), Y[1])
        np.testing.assert_array_equal(predict(operations, far, [[1, 2, 3, 4]]), [[1, 4]])
    assert far.asked.count("ModelMetadata") == 1
    assert predict(operations, far, np.empty((0, 4))).shape == (0, 2)


def test_an_answer_belongs_to_its_caller() -> None:
    # The second answer of a kind is read by what the first left behind: neither may share memory with another.
    operations, far = Operations(None), Far(ONE)
    first, second = predict(operations, far, X), predict(operations, far, X)
    first[...] = -1
    second[...] = -2
    np.testing.assert_array_equal(predict(operations, far, X), Y)


def test_all_that_can_be_said_is_said() -> None:
    operations, far = Operations(None), Far(TWO)
    parameters: dict[str, Any] = {"a": True, "b": -3, "c": 2**63, "d": 0.5, "e": "é"}
    given = {"ids": np.array([1, 2], np.int32), "x": X}
    answer = infer(operations, far, given, id="ü" * 70, outputs=["names", "y"], priority=3, parameters=parameters)
    (request,) = far.requests
    assert request.id == answer.id == "ü" * 70
    assert [output.name for output in request.outputs] == list(answer) == ["names", "y"]
    assert [(i.name, i.datatype, list(i.shape)) for i in request.inputs] == [
        ("ids", "INT64", [2]),
        ("x", "FP32", [2, 4]),
    ]
    said = {key: getattr(p, p.WhichOneof("parameter_choice")) for key, p in request.parameters.items()}
    assert said == parameters | {"priority": 3}
    assert request.parameters["c"].WhichOneof("parameter_choice") == "uint64_param"
    assert answer["names"].tolist() == ["a", "a"]
    np.testing.assert_array_equal(answer["y"], Y)
    assert (answer.model, answer.version, answer.timings) == ("m", "1", None)
    assert answer.labels("y") == ("low", "high") and answer.labels("names") == ()


def test_what_was_said_once_is_not_said_for_others() -> None:
    # Requests that differ in one thing only, in turn: what is remembered of one must not show in another.
    operations, far = Operations(None), Far(TWO)
    given = {"x": X, "ids": np.array([1, 2])}
    variants: list[dict[str, Any]] = [
        {}, {"id": "7"}, {"outputs": ["y"]}, {"outputs": "names"}, {"priority": 2}, {"parameters": {"a": 1}},
        {"id": "8"},
    ]  # fmt: skip
    for _ in range(2):
        for options in variants:
            far.requests.clear()
            answer = infer(operations, far, given, **options)
            (request,) = far.requests
            assert request.id == answer.id == options.get("id", "")
            wanted = options.get("outputs", ["y", "names"])
            assert list(answer) == ([wanted] if isinstance(wanted, str) else wanted)
            keys = {"priority"} if "priority" in options else set(options.get("parameters", ()))
            assert set(request.parameters) == keys
            assert len(request.raw_input_contents) == len(request.inputs) == 2


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"z": X}, "model 'm' has no input 'z'; expected 'x', 'ids'"),
        (X, "model 'm' has the inputs 'x', 'ids': give a mapping of arrays"),
        ({"x": X, "ids": [0.5, 1.5]}, "input 'ids': expected int64"),
    ],
)
def test_what_cannot_be_right_is_not_sent(inputs: Any, text: str) -> None:
    operations, far = Operations(None), Far(TWO)
    with pytest.raises(InvalidArgument, match=text):
        infer(operations, far, inputs)
    assert "ModelInfer" not in far.asked


def test_predict_asks_for_one_output_of_several() -> None:
    operations, far = Operations(None), Far(ModelSignature((ROWS,), TWO.outputs, batchable=True))
    with pytest.raises(InvalidArgument, match="model 'm' gives y, names: ask for one of them"):
        predict(operations, far, X)
    assert predict(operations, far, X[0], output="names").tolist() == "a"


def test_a_model_that_changed_is_asked_about_again() -> None:
    operations = Operations(None)
    predict(operations, Far(ONE), X)
    renamed = ModelSignature((TensorSpec("rows", protocol.DATATYPES["FP64"], (-1, 4)),), (SUMS,), batchable=True)
    far = Far(renamed, version="2")
    # Refused as it was built for the old one; asked about, built again, answered: the caller sees none of it.
    np.testing.assert_array_equal(predict(operations, far, X), Y)
    assert far.asked == ["ModelInfer", "ModelMetadata", "ModelInfer"]
    np.testing.assert_array_equal(predict(operations, far, X), Y)
    assert far.asked[3:] == ["ModelInfer"]


def test_an_answer_of_another_version_is_asked_about_before_the_next_call() -> None:
    operations = Operations(None)
    predict(operations, Far(ONE), X)
    far = Far(ONE, version="2")
    predict(operations, far, X)
    predict(operations, far, X)
    predict(operations, far, X)
    assert far.asked == ["ModelInfer", "ModelMetadata", "ModelInfer", "ModelInfer"]


def test_a_request_that_is_wrong_stays_wrong() -> None:
    operations, far = Operations(None), Far(ONE)
    with pytest.raises(InvalidArgument, match=r"expected shape \[-1,4\], got \[1,3\]"):
        predict(operations, far, [1.0, 2, 3])
    assert far.asked == ["ModelMetadata", "ModelInfer"]
    predict(operations, far, X)
    with pytest.raises(InvalidArgument, match="expected shape"):
        predict(operations, far, [1.0, 2, 3])
    # Asked about once more, found unchanged, and not sent a second time.
    assert far.asked[2:] == ["ModelMetadata", "ModelInfer", "ModelInfer", "ModelMetadata"]


def test_a_refusal_of_the_moment_does_not_forget_the_model() -> None:
    operations, far = Operations(None), Far(ONE)
    predict(operations, far, X)

    def gone(_call: Call) -> Reply:
        raise Unavailable("gone")

    with pytest.raises(Unavailable):
        drive(operations.predict("m", X, output=None, version="", timeout=None, priority=0), gone)
    predict(operations, far, X)
    assert far.asked.count("ModelMetadata") == 1


def test_timings_are_asked_for_and_read() -> None:
    operations, far = Operations(None), Far(ONE)
    far.trailing = [
        ("forwardpass-queue-us", "12"), ("forwardpass-run-us", "34.5"), ("forwardpass-total-us", "60"),
        ("forwardpass-batch-rows", "8"), ("elsewhere", "x"),
    ]  # fmt: skip
    assert infer(operations, far, X).timings is None
    timings = infer(operations, far, X, timings=True).timings
    assert timings is not None
    assert (timings.queue_us, timings.run_us, timings.total_us, timings.batch_rows) == (12.0, 34.5, 60.0, 8)
    far.trailing = []
    timings = infer(operations, far, X, timings=True).timings
    assert timings is not None and timings.total_us is None and timings.batch_rows is None


def test_the_time_limit_of_a_call_comes_before_the_clients() -> None:
    for client, call, expected in (
        (3.0, None, 3.0), (3.0, 0.5, 0.5), (None, None, None), (None, 2.0, 2.0), (3.0, float("inf"), None),
    ):  # fmt: skip
        assert next(Operations(client).server(timeout=call)).timeout == expected


def test_an_answer_that_cannot_be_read_is_the_servers_fault() -> None:
    info = next_info(Far(ONE))
    assert info.parameters == {"max_batch_size": 64, "contract": True}
    response = protocol.ModelInferResponse(model_name="m", raw_output_contents=[b"1", b"2"])
    response.outputs.add(name="y", datatype="FP32", shape=[1, 1])
    for message, text in (
        (b"\xff\xff", "the answer is no ModelInferResponse"),
        (response.SerializeToString(), "1 outputs and 2 raw contents"),
    ):
        operations = Operations(None)
        steps = operations.predict("m", X, output=None, version="", timeout=None, priority=0)
        next(steps)
        steps.send(Reply(Far(ONE).metadata(), ()))
        with pytest.raises(Internal, match=text):
            steps.send(Reply(message, ()))


def test_what_only_reads_like_a_tensor_is_not_taken_for_one() -> None:
    # The message ends with a field that no client knows, whose last bytes look like the tensor's field.
    def answer(other: float) -> bytes:
        response = protocol.ModelInferResponse(model_name="m", model_version="1")
        response.outputs.add(name="y", datatype="FP32", shape=[1, 1])
        response.raw_output_contents.append(np.float32(1).tobytes())
        decoy = b"\x32\x04" + np.float32(other).tobytes()  # field 6, 4 bytes
        return bytes(response.SerializeToString()) + b"\x7a" + bytes([len(decoy)]) + decoy  # field 15

    operations, far = Operations(None), Far(ONE)
    for other in (1.0, 1.0, 2.0):

        def hear(call: Call, other: float = other) -> Reply:
            return far.hear(call) if call.path.endswith("ModelMetadata") else Reply(answer(other), ())

        got = drive(operations.predict("m", X, output=None, version="", timeout=None, priority=0), hear)
        assert got.tolist() == [[1.0]]


def test_labels_of_another_servers_making_are_no_labels() -> None:
    for text in ("not json", '"a"', "{}"):
        response = protocol.ModelMetadataResponse.FromString(Far(ONE).metadata())
        response.outputs[0].parameters["labels"].string_param = text
        assert next_info(response).labels("y") == ()


def next_info(source: Far | Any) -> ModelInfo:
    data = source.metadata() if isinstance(source, Far) else source.SerializeToString()
    info = drive(Operations(None).metadata("m", version="", timeout=None), lambda _call: Reply(data, ()))
    assert isinstance(info, ModelInfo)
    return info


def test_whether_anybody_is_there_is_an_answer_not_an_error() -> None:
    def nobody(_call: Call) -> Reply:
        raise Unavailable("nobody")

    def unknown(_call: Call) -> Reply:
        raise NotFound("no model 'm'")

    operations = Operations(None)
    assert drive(operations.live(timeout=None), nobody) is False
    assert drive(operations.ready(None, version="", timeout=None), nobody) is False
    assert drive(operations.ready("m", version="", timeout=None), nobody) is False
    with pytest.raises(NotFound):
        drive(operations.ready("m", version="", timeout=None), unknown)
