"""One batch through a real network: each request gets the bytes that protobuf would write for its own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tests.service import models
from tests.unit.made import Target, raw, read, request_for, session, signature, tensor

from forwardpass import protocol
from forwardpass.errors import DeadlineExceeded, InvalidRequest, RunFailed
from forwardpass.execution.ort_session import OrtSession, new_run_options
from forwardpass.inference.batch_runner import BatchRunner
from forwardpass.inference.request import AnyRequest
from forwardpass.model.example_inputs import example
from forwardpass.model.signature import ModelSignature


class Ran:
    """A network with a runner, and what it said of its matrices."""

    def __init__(self, model: onnx.ModelProto, folder: Path, rows: int = 64, independent: bool = True) -> None:
        self.session: OrtSession = session(model, folder)
        self.target = Target(self.session.signature, "m", "3")
        self.runner = BatchRunner(self.session, self.session.signature, rows, independent)
        self.matrices: list[int] = []

    def request(self, *arrays: NDArray[Any], **more: Any) -> AnyRequest:
        return request_for(self.target, arrays, **more)

    def answers(self, *requests: AnyRequest) -> list[bytes]:
        outputs, wanted = self.runner.run(requests, new_run_options(), self.matrices)
        found = self.runner.scatter(requests, outputs, wanted)
        assert all(isinstance(a, bytes) for a in found)
        return list(found)


def rows(*counts: int, width: int = 4, seed: int = 0) -> list[NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((count, width)).astype(np.float32) for count in counts]


def expected(
    found: ModelSignature, places: Sequence[int], arrays: Sequence[NDArray[Any]], request_id: str = ""
) -> bytes:
    """The response as protobuf makes it."""
    response = protocol.ModelInferResponse(model_name="m", model_version="3", id=request_id)
    for place, array in zip(places, arrays, strict=True):
        output = found.outputs[place]
        response.outputs.add(name=output.name, datatype=output.datatype.name, shape=array.shape)
        response.raw_output_contents.append(raw(array))
    return bytes(response.SerializeToString())


@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (3, 1, 2), (0, 2, 0), (0,), (0, 0), (64,)])
def test_everybody_gets_the_bytes_of_their_own_rows(tmp_path: Path, counts: tuple[int, ...]) -> None:
    ran = Ran(models.chain(), tmp_path)
    arrays = rows(*counts)
    answers = ran.answers(*(ran.request(x, id=f"r{i}") for i, x in enumerate(arrays)))
    for i, (answer, x) in enumerate(zip(answers, arrays, strict=True)):
        (y,) = ran.session.run([x], (0,))
        assert answer == expected(ran.session.signature, (0,), [y], f"r{i}")
    assert ran.matrices == [sum(counts)]


@pytest.mark.parametrize("model", [models.chain, models.two_by_two])
def test_requests_of_one_template_have_their_own_ids(tmp_path: Path, model: Callable[[], onnx.ModelProto]) -> None:
    ran = Ran(model(), tmp_path)
    arrays = example_inputs(ran)
    requests = [ran.request(*arrays, id=request_id) for request_id in ("a", "", "b" * 300, "\u00e9", "")]
    for request in requests:
        request.template = requests[0].template
    places = requests[0].template.outputs
    outputs = ran.session.run(arrays, places)
    for answer, request_id in zip(ran.answers(*requests), ("a", "", "b" * 300, "\u00e9", ""), strict=True):
        assert answer == expected(ran.session.signature, places, outputs, request_id)


def example_inputs(ran: Ran) -> list[NDArray[Any]]:
    return [example(tensor, 1, np.random.default_rng(0)) for tensor in ran.session.signature.inputs]


def test_requests_may_ask_for_different_outputs(tmp_path: Path) -> None:
    ran = Ran(models.two_by_two(), tmp_path)
    asked = [(0, 1, 2), (2,), (2, 0), (1,), (0,)]
    requests, arrays = [], []
    for i, places in enumerate(asked):
        a, n = np.full((i + 1, 3), i, np.float32), np.full((i + 1, 1), 10 * i)
        arrays.append(ran.session.run([a, n], (0, 1, 2)))
        requests.append(ran.request(a, n, outputs=places))
    for answer, places, outputs in zip(ran.answers(*requests), asked, arrays, strict=True):
        assert answer == expected(ran.session.signature, places, [outputs[p] for p in places])


def test_only_what_somebody_wants_is_computed(tmp_path: Path) -> None:
    ran = Ran(models.two_by_two(), tmp_path)
    a, n = np.ones((1, 3), np.float32), np.ones((1, 1), np.int64)
    requests = [ran.request(a, n, outputs=(2,)), ran.request(a, n, outputs=(0,))]
    outputs, wanted = ran.runner.run(requests, new_run_options(), [])
    assert wanted == (0, 2) and len(outputs) == 2
    answers = ran.runner.scatter(requests, outputs, wanted)
    assert [read(a)[1][0].tolist() for a in answers if isinstance(a, bytes)] == [[[1]], [[2, 2, 2]]]


def test_text_comes_back_to_whom_it_belongs(tmp_path: Path) -> None:
    ran = Ran(models.echo(models.STRING), tmp_path)
    words = [np.array(w, object).reshape(-1, 2) for w in (["a", ""], ["ü", "bb", "c\0", "d"], [])]
    for answer, array in zip(ran.answers(*(ran.request(w) for w in words)), words, strict=True):
        assert answer == expected(ran.session.signature, (0,), [array])


@pytest.mark.parametrize("name", [n for n in models.ELEMENTS if n != "BYTES"])
def test_every_datatype_keeps_its_bytes(tmp_path: Path, name: str) -> None:
    ran = Ran(models.echo(models.ELEMENTS[name]), tmp_path)
    dtype = protocol.DATATYPES[name].numpy
    arrays = [np.arange(2 * count).reshape(count, 2).astype(dtype) for count in (1, 3)]
    for answer, x in zip(ran.answers(*(ran.request(x) for x in arrays)), arrays, strict=True):
        _, (y,) = read(answer)
        assert y.tobytes() == x.tobytes() and y.shape == x.shape


@pytest.mark.parametrize(("count", "matrices"), [(9, [4, 4, 1]), (8, [4, 4]), (4, [4]), (5, [4, 1])])
def test_a_large_request_is_run_in_slices(tmp_path: Path, count: int, matrices: list[int]) -> None:
    ran = Ran(models.two_by_two(), tmp_path, rows=4)
    a, n = np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32), np.arange(count).reshape(-1, 1)
    (answer,) = ran.answers(ran.request(a, n))
    assert answer == expected(ran.session.signature, (0, 1, 2), ran.session.run([a, n], (0, 1, 2)))
    assert ran.matrices == matrices


def test_rows_that_depend_on_each_other_are_not_sliced(tmp_path: Path) -> None:
    ran = Ran(models.centred(), tmp_path, rows=1, independent=False)
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    _, (y,) = read(ran.answers(ran.request(x))[0])
    assert np.array_equal(y, x - x.mean(axis=0))
    assert ran.matrices == [3]


def test_without_a_batch_axis_shapes_are_the_models_own(tmp_path: Path) -> None:
    ran = Ran(models.twice_the_rows(), tmp_path)
    found = ModelSignature(ran.session.signature.inputs, ran.session.signature.outputs, batchable=False)
    ran.target, ran.runner = Target(found), BatchRunner(ran.session, found, 1, False)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    _, (y,) = read(ran.answers(ran.request(x))[0])
    assert np.array_equal(y, np.concatenate([x, x]))
    assert ran.matrices == [1]


def test_an_output_that_lost_its_batch_axis_is_an_error_not_a_mix_up(tmp_path: Path) -> None:
    ran = Ran(models.twice_the_rows(), tmp_path)
    with pytest.raises(RunFailed, match=r"shape \[4, 3\] for 2 rows: .*not the batch"):
        ran.answers(*(ran.request(np.ones((1, 3), np.float32)) for _ in range(2)))


def test_errors_of_the_network_come_through(tmp_path: Path) -> None:
    ran = Ran(models.table(), tmp_path)
    with pytest.raises(InvalidRequest, match="idx=99"):
        ran.answers(ran.request(np.array([[1]])), ran.request(np.array([[99]])))


@pytest.mark.parametrize("rows_", [4, 1])
def test_a_run_that_was_ended_says_so(tmp_path: Path, rows_: int) -> None:
    ran = Ran(models.hold(), tmp_path, rows=rows_)
    options = new_run_options()
    options.terminate = True
    with pytest.raises(DeadlineExceeded) as caught:
        ran.runner.run([ran.request(np.ones((3, 1), np.float32))], options, [])
    assert caught.value.reason == "run_timeout"


def test_what_is_remembered_of_answers_is_bounded_and_right() -> None:
    # Widths that change from answer to answer, as with a network whose shapes depend on its data.
    found = signature(outputs=[tensor("y", "FP32", -1, -1)])
    request = request_for(Target(found, "m", "3"), [np.ones((2, 2), np.float32)])
    runner = BatchRunner(SimpleNamespace(own_thread=False), found, 64, True)  # type: ignore[arg-type]  # nothing is run
    for width in [*range(100), *range(100)]:
        y = np.random.default_rng(width).standard_normal((2, width)).astype(np.float32)
        assert runner.scatter([request], [y], (0,)) == [expected(found, (0,), [y])]
        assert len(request.template.replies) < 50
