"""ModelStreamInfer behind both transports: order, errors in-band, many in flight, and how a stream ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import pytest
from caller import Caller
from numpy.typing import NDArray

from forwardpass import protocol
from forwardpass.api.infer_stream import IN_FLIGHT
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
STREAM = protocol.METHODS["ModelStreamInfer"]
LONG_RUN = 3_000_000.0  # turns of `hold`: seconds, on any machine
PATIENCE = 60.0  # seconds, for what should take a moment


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    models.save(folder, "chain", models.chain())
    models.save(folder, "table", models.table(), "max_batch_size = 4\n")
    models.save(folder, "hold", models.hold(), "instances = 2\n")
    return folder


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def running(request: pytest.FixtureRequest, repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(repository, "--transport", request.param) as server:
        yield server
        assert server.stop() == 0, server.tail()


def asking(model: str, array: NDArray[Any], request_id: str = "", datatype: str = "FP32") -> Any:
    request = protocol.ModelInferRequest(model_name=model, id=request_id)
    request.inputs.add(name="x", datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


class Conversation:
    """A stream of messages as bytes: send when you like, receive when you like."""

    def __init__(self, address: str, metadata: Sequence[tuple[str, str]] = (), timeout: float = PATIENCE) -> None:
        self._channel = grpc.insecure_channel(address)
        self._more = threading.Condition()
        self._outgoing: list[bytes] = []
        self._over = False
        self.call = self._channel.stream_stream(
            STREAM.path, request_serializer=None, response_deserializer=STREAM.response.FromString
        )(self._requests(), metadata=tuple(metadata), timeout=timeout)

    def _requests(self) -> Iterator[bytes]:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._outgoing or self._over)
                if not self._outgoing:
                    return
                message = self._outgoing.pop(0)
            yield message

    def send(self, *requests: Any) -> None:
        with self._more:
            self._outgoing += [r if isinstance(r, bytes) else r.SerializeToString() for r in requests]
            self._more.notify()

    def finish(self) -> None:
        """No more requests."""
        with self._more:
            self._over = True
            self._more.notify()

    def receive(self) -> Any:
        return next(self.call)

    def rest(self) -> list[Any]:
        self.finish()
        return list(self.call)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self.call.cancel()
        self._channel.close()


def rows_of(response: Any) -> NDArray[Any]:
    assert response.error_message == ""
    (output,) = response.infer_response.outputs
    return np.frombuffer(response.infer_response.raw_output_contents[0], "<f4").reshape(tuple(output.shape))


def in_flight(server: ServerProcess) -> float:
    line = next(ln for ln in server.metrics().splitlines() if ln.startswith("forwardpass_in_flight_requests "))
    return float(line.split()[-1])


def until(done: Callable[[], bool]) -> None:
    """Ask until it is so, for a while."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.05)):
        if done():
            return
        waiting.wait(0.05)
    raise AssertionError("it did not come to that")


def test_each_request_has_one_answer_in_the_order_they_came(running: ServerProcess) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1 + i % 3, 4)).astype(np.float32) for i in range(300)]
    unary = protocol.METHODS["ModelInfer"]
    with grpc.insecure_channel(running.address) as channel:
        infer = channel.unary_unary(unary.path, unary.request.SerializeToString, unary.response.FromString)
        expected = [infer(asking("chain", a)).raw_output_contents[0] for a in arrays]
    with Conversation(running.address) as stream:
        stream.send(*[asking("chain", a, str(i)) for i, a in enumerate(arrays)])
        found = stream.rest()
    assert [f.infer_response.id for f in found] == [str(i) for i in range(300)]
    assert [f.infer_response.raw_output_contents[0] for f in found] == expected
    assert all(f.infer_response.parameters["triton_final_response"].bool_param for f in found)
    assert all((f.infer_response.model_name, f.infer_response.model_version) == ("chain", "1") for f in found)


def test_an_answer_comes_while_the_stream_is_open_for_more(running: ServerProcess) -> None:
    with Conversation(running.address) as stream:
        for i in range(3):
            stream.send(asking("chain", np.ones((1, 4), np.float32), str(i)))
            assert stream.receive().infer_response.id == str(i)
        assert stream.rest() == []


def test_an_error_is_told_in_band_and_the_stream_goes_on(running: ServerProcess) -> None:
    good = asking("table", np.array([[3]]), "good", "INT64")
    with Conversation(running.address) as stream:
        stream.send(
            good,
            asking("nobody", np.array([[3]]), "unknown", "INT64"),
            asking("table", np.array([[99]]), "poison", "INT64"),
            asking("table", np.array([[3.0]]), "wrong", "FP64"),
            b"\xff\xff\xff",
            b"",
            good,
        )
        found = stream.rest()
    texts = [f.error_message for f in found]
    assert texts[0] == texts[6] == ""
    assert rows_of(found[0]).tolist() == rows_of(found[6]).tolist() == [[30.0]]
    assert "there is no model 'nobody'" in texts[1]
    assert "the network cannot be run on these values" in texts[2]
    assert "expected datatype INT64, got 'FP64'" in texts[3]
    assert texts[4] == "the message is not a ModelInferRequest"
    assert texts[5] == "the request names no model"
    assert [f.infer_response.id for f in found] == ["good", "unknown", "poison", "wrong", "", "", "good"]
    assert found[1].infer_response.model_name == "nobody"


def test_a_client_that_asks_for_it_gets_an_error_as_the_status(running: ServerProcess) -> None:
    with Conversation(running.address, metadata=[("triton_grpc_error", "true")]) as stream:
        stream.send(asking("table", np.array([[3]]), "good", "INT64"), asking("nobody", np.array([[3]])))
        assert stream.receive().infer_response.id == "good"
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "there is no model 'nobody'" in caught.value.details()


def test_more_requests_than_may_be_in_flight_are_all_answered(running: ServerProcess) -> None:
    count = 2 * IN_FLIGHT + 100
    with Conversation(running.address) as stream:
        # The first holds up the others until the stream reads no further.
        stream.send(asking("hold", np.full((1, 1), LONG_RUN / 20, np.float32), "0"))
        stream.send(*[asking("chain", np.full((1, 4), i, np.float32), str(i)) for i in range(1, count)])
        assert [f.infer_response.id for f in stream.rest()] == [str(i) for i in range(count)]


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_request_past_its_timeout_fails_alone(repository: Path, serve: Serve, transport: str) -> None:
    late = asking("hold", np.ones((1, 1), np.float32), "late")
    late.parameters["timeout"].int64_param = 1  # microseconds, to wait for an instance
    server = serve(repository, "--transport", transport, "--inline-run-limit", "0")
    caller = Caller(server)
    with Conversation(server.address) as holders, Conversation(server.address) as stream:
        for busy in (1, 2):  # one by one: together they would share a run
            holders.send(asking("hold", np.full((1, 1), 1e15, np.float32)))
            until(lambda busy=busy: caller.metric("forwardpass_running_requests") == busy)  # type: ignore[misc]
        stream.send(asking("chain", np.ones((1, 4), np.float32), "before"), late)
        stream.send(asking("chain", np.ones((1, 4), np.float32), "after"))
        found = stream.rest()
        server.kill()
    caller.close()
    assert [f.infer_response.id for f in found] == ["before", "late", "after"]
    assert [bool(f.error_message) for f in found] == [False, True, False]
    assert "its queue timeout is 0.0 ms" in found[1].error_message


def test_a_client_that_leaves_takes_its_requests_with_it(running: ServerProcess) -> None:
    with Conversation(running.address) as stream:
        stream.send(*[asking("hold", np.full((1, 1), LONG_RUN, np.float32), str(i)) for i in range(20)])
        until(lambda: in_flight(running) == 20)
        stream.call.cancel()
        # They are gone at once, though their runs go on.
        until(lambda: in_flight(running) == 0)
    with Conversation(running.address) as stream:
        stream.send(asking("chain", np.ones((1, 4), np.float32), "after"))
        assert [f.infer_response.id for f in stream.rest()] == ["after"]


def test_a_stream_may_end_without_a_request(running: ServerProcess) -> None:
    with Conversation(running.address) as stream:
        assert stream.rest() == []
    assert stream.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_stopping_server_answers_what_it_read_and_ends_the_stream(
    repository: Path, serve: Serve, transport: str
) -> None:
    server = serve(repository, "--transport", transport)
    with Conversation(server.address) as stream:
        stream.send(asking("hold", np.full((1, 1), LONG_RUN / 20, np.float32), "running"))
        until(lambda: in_flight(server) == 1)
        server.send(signal.SIGTERM)
        found = []
        with contextlib.suppress(grpc.RpcError):
            found += [stream.receive().infer_response.id]
            while True:
                found += [stream.receive().infer_response.id]
    assert found == ["running"]
    assert stream.call.code() is grpc.StatusCode.UNAVAILABLE
    assert server.wait() == 0
