"""Requests on a stream matched with what comes: by id, each settled once, whatever else comes. No channel."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from tests.unit.client.far_end import ONE, TWO, Far, drive

from forwardpass import protocol
from forwardpass.api.infer_stream import stream_error, stream_response
from forwardpass.client.errors import (
    CallError,
    Cancelled,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from forwardpass.client.operations import Operations
from forwardpass.client.options import SUBMIT
from forwardpass.client.pending import PendingRequests, StreamedRequest
from forwardpass.client.results import Answer, read_info
from forwardpass.errors import Overloaded, Status, UnknownModel

INFO = read_info(protocol.ModelMetadataResponse.FromString(Far(ONE).metadata()))


def asked(pending: PendingRequests, id: str = "") -> tuple[str, Future[Answer]]:
    future: Future[Answer] = Future()
    wire_id = pending.new_id()
    pending.add(wire_id, StreamedRequest(future, INFO, "m", "", id))
    return wire_id, future


def answer(wire_id: str, value: float = 0.0) -> bytes:
    """As the server puts it on a stream."""
    response = protocol.ModelInferResponse(model_name="m", model_version="1", id=wire_id)
    response.outputs.add(name="y", datatype="FP32", shape=[1, 1])
    response.raw_output_contents.append(np.float32(value).tobytes())
    return stream_response(response.SerializeToString())


def refusal(wire_id: str, error: Any) -> bytes:
    return stream_error(protocol.ModelInferRequest(id=wire_id, model_name="m").SerializeToString(), error)


@pytest.fixture
def pending() -> PendingRequests:
    return PendingRequests(Operations(None), "host:1")


def test_answers_find_their_requests_in_any_order(pending: PendingRequests) -> None:
    sent = [asked(pending, id=f"mine {i}") for i in range(5)]
    for place in (3, 0, 4, 1, 2):
        assert pending.on_response(answer(sent[place][0], place))
    for place, (_, future) in enumerate(sent):
        got = future.result(0)
        assert got["y"].tolist() == [[float(place)]]
        assert (got.id, got.model, got.version) == (f"mine {place}", "m", "1")
        assert got.labels("y") == ("low", "high")


def test_an_error_in_band_is_the_error_it_would_be_of_a_call(pending: PendingRequests) -> None:
    (first, unknown), (second, full), (third, good) = (asked(pending) for _ in range(3))
    assert pending.on_response(refusal(first, UnknownModel("no model 'm'")))
    assert pending.on_response(refusal(second, Overloaded("full", retry_after=0.25)))
    assert pending.on_response(answer(third))
    error = unknown.exception(0)
    assert type(error) is NotFound and str(error) == "NOT_FOUND: no model 'm'" and error.retry_after is None
    error = full.exception(0)
    assert type(error) is ResourceExhausted and error.retry_after == 0.25
    assert good.result(0)["y"].tolist() == [[0.0]]


def test_a_server_of_another_make_tells_no_status(pending: PendingRequests) -> None:
    wire_id, future = asked(pending)
    response = protocol.ModelStreamInferResponse(error_message="[request id: 0] no")
    response.infer_response.id = wire_id
    assert pending.on_response(response.SerializeToString())
    error = future.exception(0)
    assert type(error) is CallError and error.status is Status.UNKNOWN and "no" in error.details


def test_what_answers_nothing_does_no_harm_unless_it_is_an_error(pending: PendingRequests) -> None:
    wire_id, future = asked(pending)
    assert pending.on_response(answer(wire_id))
    assert not pending.on_response(answer(wire_id)), "a second answer to the same request"
    with pytest.raises(CallError, match="no model"):
        pending.on_response(refusal("", UnknownModel("no model 'm'")))
    with pytest.raises(Internal, match="the answer is no ModelStreamInferResponse"):
        pending.on_response(b"\xff\xff")
    assert future.result(0)["y"].tolist() == [[0.0]]


def test_an_answer_that_cannot_be_read_fails_its_request_alone(pending: PendingRequests) -> None:
    (first, bad), (second, good) = (asked(pending) for _ in range(2))
    response = protocol.ModelInferResponse(model_name="m", model_version="1", id=first)
    response.outputs.add(name="y", datatype="FP32", shape=[7, 7])
    response.raw_output_contents.append(b"1234")
    assert pending.on_response(stream_response(response.SerializeToString()))
    assert pending.on_response(answer(second))
    assert type(bad.exception(0)) is Internal
    good.result(0)


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_who_cancelled_is_passed_over(kind: str) -> None:
    loop = asyncio.new_event_loop()
    pending = PendingRequests(Operations(None), "host:1")
    futures: list[Any] = [Future() if kind == "threads" else loop.create_future() for _ in range(3)]
    ids = [pending.new_id() for _ in futures]
    for wire_id, future in zip(ids, futures, strict=True):
        pending.add(wire_id, StreamedRequest(future, INFO, "m", "", ""))
        future.cancel()
    assert pending.on_response(answer(ids[0]))
    assert pending.on_response(refusal(ids[1], UnknownModel("no model 'm'")))
    assert pending.end(Cancelled("the stream is closed")) == 1
    assert all(future.cancelled() for future in futures)
    loop.close()


def test_the_end_settles_all_and_nothing_comes_after_it(pending: PendingRequests) -> None:
    futures = [asked(pending)[1] for _ in range(3)]
    assert type(pending.over()) is Internal
    assert "left 3 requests unanswered" in str(pending.over())
    assert pending.end(Unavailable("gone", retry_after=1.5)) == 3
    errors = [future.exception(0) for future in futures]
    assert all(type(error) is Unavailable and error.retry_after == 1.5 for error in errors)
    assert len(set(map(id, errors))) == 3
    assert type(pending.over()) is Cancelled
    assert pending.end(Cancelled("later")) == 0
    with pytest.raises(Unavailable, match="gone"):
        asked(pending)


def test_a_request_says_its_time_limit_and_its_id() -> None:
    operations, far = Operations(None), Far(TWO)
    rows = {"x": np.zeros((2, 4)), "ids": [1, 2]}

    def built(timeout: float | None, **parameters: Any) -> Any:
        steps = operations.streamed(
            "7", "m", rows, {**SUBMIT, "outputs": ["y"], "timeout": timeout, "priority": 3, "parameters": parameters}
        )
        request, info = drive(steps, far.hear)
        assert info.name == "m"
        return protocol.ModelInferRequest.FromString(request)

    request = built(0.05, a=1)
    assert request.id == "7" and [output.name for output in request.outputs] == ["y"]
    said = {key: getattr(p, p.WhichOneof("parameter_choice")) for key, p in request.parameters.items()}
    assert said == {"timeout": 50_000, "priority": 3, "a": 1}
    assert built(1e-9).parameters["timeout"].int64_param == 1
    assert "timeout" not in built(None).parameters and "timeout" not in built(float("inf")).parameters
    assert far.asked == ["ModelMetadata"]


def test_after_some_errors_the_model_is_asked_about_again() -> None:
    operations, far = Operations(None), Far(ONE)
    x = np.zeros((1, 4), np.float32)
    drive(operations.streamed("0", "m", x, SUBMIT), far.hear)
    operations.refused(ResourceExhausted("full"), "m", "")
    drive(operations.streamed("1", "m", x, SUBMIT), far.hear)
    assert far.asked.count("ModelMetadata") == 1
    operations.refused(InvalidArgument("no"), "m", "")
    drive(operations.streamed("2", "m", x, SUBMIT), far.hear)
    response = protocol.ModelInferResponse(model_name="m", model_version="2")
    operations.heard(response, INFO, "m", "", "")
    drive(operations.streamed("3", "m", x, SUBMIT), far.hear)
    assert far.asked.count("ModelMetadata") == 3
