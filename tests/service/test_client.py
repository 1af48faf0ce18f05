"""Client and AsyncClient against real servers, behind each transport: answers, conversions, every kind of failure."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from models import ELEMENTS, FLOAT, echo, network, save, two_by_two
from onnx import helper

from forwardpass import AsyncClient, Client, errors
from forwardpass.client import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from forwardpass.protocol import DATATYPES
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

RNG = np.random.default_rng(0)
X = RNG.integers(0, 17, (40, 64)).astype(np.float32)
NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def expected(digits_repository: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(digits_repository / "digits" / "1" / "model.onnx")
    (logits,) = session.run(None, {"x": X})
    return np.asarray(logits)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@contextmanager
def frozen(server: ServerProcess) -> Iterator[None]:
    """The server's process is there, its ports are open, and nothing in it moves."""
    server.send(signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED)  # until its last thread stands still
    try:
        yield
    finally:
        server.send(signal.SIGCONT)


def test_answers_are_onnxruntimes_bit_for_bit(client: Client, expected: np.ndarray) -> None:
    assert client.predict("digits", X).tobytes() == expected.tobytes()
    assert client.predict("digits", X[3]).tobytes() == expected[3].tobytes()
    assert client.predict("digits", X[3]).shape == (10,)
    assert client.predict("digits", X[3:4]).shape == (1, 10)
    assert client.predict("digits", X[:0]).shape == (0, 10)


def test_other_dtypes_become_the_models(client: Client, expected: np.ndarray) -> None:
    for rows in (X.astype(np.float64), X.astype(np.uint8), X.astype(np.int64), X.tolist(), X.astype(">f4")):
        assert client.predict("digits", rows).tobytes() == expected.tobytes()
    with pytest.raises(
        InvalidArgument, match=r"input 'x': expected float32 \(FP32\), got int64 with the value 16777217"
    ):
        client.predict("digits", np.full((1, 64), 2**24 + 1))


def test_an_answer_says_all_that_the_server_says(client: Client) -> None:
    answer = client.infer("digits", {"x": X[:3]}, id="a-1", outputs=["logits"], version="1", timings=True)
    assert list(answer) == ["logits"]
    assert (answer.model, answer.version, answer.id) == ("digits", "1", "a-1")
    assert answer.labels("logits") == tuple("0123456789")
    assert answer.timings is not None
    assert answer.timings.batch_rows is not None and answer.timings.batch_rows >= 3
    assert answer.timings.queue_us is not None and answer.timings.run_us is not None
    assert answer.timings.total_us is not None and answer.timings.total_us >= answer.timings.run_us > 0


def test_what_a_server_tells_of_itself(client: Client) -> None:
    assert client.live() and client.ready() and client.ready("digits") and client.ready("digits", version="1")
    assert client.server().name == "forwardpass"
    (state,) = client.models()
    assert (state.name, state.version, state.state) == ("digits", "1", "READY")
    info = client.metadata("digits")
    assert [str(tensor) for tensor in info.inputs] == ["x FP32[?,64]"]
    assert [str(tensor) for tensor in info.outputs] == ["logits FP32[?,10]"]


def test_many_threads_share_a_client(client: Client, expected: np.ndarray) -> None:
    def ask(start: int) -> bool:
        rows = slice(start % 30, start % 30 + 1 + start % 7)
        return client.predict("digits", X[rows]).tobytes() == expected[rows].tobytes()

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(ask, range(800)))


def test_many_tasks_share_an_async_client(server: ServerProcess, expected: np.ndarray) -> None:
    async def ask(client: AsyncClient, start: int) -> bool:
        rows = slice(start % 30, start % 30 + 1 + start % 7)
        answer = await client.infer("digits", X[rows], id=str(start), timings=start % 2 == 0)
        assert answer.id == str(start)
        assert (answer.timings is not None) == (start % 2 == 0)
        return answer["logits"].tobytes() == expected[rows].tobytes()

    async def main() -> list[bool]:
        async with AsyncClient(server.address) as client:
            assert await client.live() and await client.ready("digits")
            assert [state.name for state in await client.models()] == ["digits"]
            assert (await client.server()).name == "forwardpass"
            np.testing.assert_array_equal(await client.predict("digits", X[3]), expected[3])
            return await asyncio.gather(*(ask(client, start) for start in range(300)))

    assert all(asyncio.run(main()))


REFUSALS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (NotFound, "nothing", {"model": "nothing"}),
    (NotFound, "99", {"version": "99"}),
    (InvalidArgument, r"expected shape \[-1,64\]", {"inputs": X[:, :63]}),
    (InvalidArgument, "no input 'z'", {"inputs": {"z": X}}),
    (InvalidArgument, "unknown output 'z'", {"outputs": ["z"]}),
    (InvalidArgument, "expected float32", {"inputs": [["a"] * 64]}),
    (InvalidArgument, "priority", {"priority": 99}),
]


@pytest.mark.parametrize(("error", "text", "wrong"), REFUSALS, ids=[text for _, text, _ in REFUSALS])
def test_refusals_are_typed_and_the_same_for_both_clients(
    server: ServerProcess, error: type[Exception], text: str, wrong: dict[str, Any]
) -> None:
    arguments = {"model": "digits", "inputs": X[:2]} | wrong

    async def asynchronously() -> None:
        async with AsyncClient(server.address) as client:
            await client.infer(**arguments)

    with Client(server.address) as client, pytest.raises(error, match=text) as blocking:
        client.infer(**arguments)
    with pytest.raises(error, match=text) as awaited:
        asyncio.run(asynchronously())
    assert str(blocking.value) == str(awaited.value)


def test_nobody_there() -> None:
    with Client(NOBODY, attempts=2) as client:
        with pytest.raises(Unavailable, match=rf"^UNAVAILABLE: {NOBODY}: .*[Cc]onnection refused"):
            client.predict("digits", X)
        assert not client.live() and not client.ready() and not client.ready("digits")

    async def asynchronously() -> None:
        async with AsyncClient(NOBODY, attempts=1) as client:
            assert not await client.live()
            await client.predict("digits", X)

    with pytest.raises(Unavailable, match=NOBODY):
        asyncio.run(asynchronously())


def test_no_answer_in_time(server: ServerProcess, client: Client) -> None:
    client.predict("digits", X)
    text = f"DEADLINE_EXCEEDED: no answer from {server.address} within 0.2 s"

    async def asynchronously() -> None:
        async with AsyncClient(server.address, health_check=False) as other:
            await other.models(timeout=0.2)

    with frozen(server):
        with pytest.raises(DeadlineExceeded, match=text):
            client.predict("digits", X, timeout=0.2)
        with Client(server.address, timeout=0.2, health_check=False) as hasty, pytest.raises(errors.DeadlineExceeded):
            hasty.predict("digits", X)
        with pytest.raises(DeadlineExceeded, match=text):
            asyncio.run(asynchronously())
    client.predict("digits", X)


def test_a_client_that_is_closed_ends_its_calls(server: ServerProcess) -> None:
    client = Client(server.address)
    client.predict("digits", X)
    with frozen(server), ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.predict, "digits", X)
        with pytest.raises(TimeoutError):
            call.result(0.2)
        client.close()
        with pytest.raises(Cancelled):
            call.result(60)
    with pytest.raises(ValueError, match="the client is closed"):
        client.predict("digits", X)


def test_an_async_client_that_is_closed_ends_its_calls_and_a_task_may_leave(server: ServerProcess) -> None:
    async def leave() -> None:
        async with AsyncClient(server.address) as client:
            await client.predict("digits", X)
            with frozen(server):
                task = asyncio.create_task(client.predict("digits", X))
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                task = asyncio.create_task(client.predict("digits", X))
                await asyncio.sleep(0.1)
                await client.close()
                with pytest.raises(Cancelled):
                    await task
            with pytest.raises(ValueError, match="the client is closed"):
                await client.predict("digits", X)

    asyncio.run(leave())


def test_a_message_beyond_the_limit_is_refused_at_either_end(digits_repository: Path, serve: Serve) -> None:
    server = serve(digits_repository, "--max-message-bytes", "2048")
    with Client(server.address) as client:
        with pytest.raises(ResourceExhausted, match="2048"):
            client.predict("digits", X)
        client.predict("digits", X[:2])
    with Client(server.address, max_message_bytes=1024) as client, pytest.raises(ResourceExhausted, match="1024"):
        client.predict("digits", X[:6])


def test_a_full_server_says_when_to_come_back(digits_repository: Path, serve: Serve) -> None:
    # The bound is on bytes in flight: several large requests at once cannot all be admitted.
    server = serve(digits_repository, "--max-bytes", "65536")
    rows = np.zeros((200, 64), np.float32)
    with Client(server.address) as client:
        client.predict("digits", rows)
        refused: list[ResourceExhausted] = []

        def ask(_: int) -> None:
            try:
                client.predict("digits", rows)
            except ResourceExhausted as error:
                refused.append(error)

        with ThreadPoolExecutor(16) as threads:
            for _attempt in range(200):
                list(threads.map(ask, range(16)))
                if refused:
                    break
        assert refused, "3,200 requests of 51 kB, 16 at a time, all passed a bound of 64 kB"
        assert refused[0].retry_after is not None and refused[0].retry_after > 0
        client.predict("digits", rows)


def test_a_model_that_failed_to_load_says_why(tmp_path: Path, serve: Serve) -> None:
    save(tmp_path, "good", echo())
    broken = save(tmp_path, "broken", echo())
    (broken / "model.onnx").write_bytes(b"no network")
    server = serve(tmp_path)
    with Client(server.address) as client:
        with pytest.raises(FailedPrecondition, match="broken"):
            client.predict("broken", [[1.0, 2.0]])
        assert not client.ready("broken")
        states = {state.name: state for state in client.models()}
        assert states["good"].state == "READY" and states["good"].reason == ""
        assert states["broken"].state == "UNAVAILABLE" and states["broken"].reason
        assert [state.name for state in client.models(ready=True)] == ["good"]
        assert client.predict("good", [1.0, 2.0]).tolist() == [1.0, 2.0]


def test_every_datatype_comes_back_as_it_went(tmp_path: Path, serve: Serve) -> None:
    sent: dict[str, np.ndarray] = {}
    for name, element in ELEMENTS.items():
        if name == "BF16":
            continue  # ONNX Runtime exchanges no bfloat16 with numpy
        save(tmp_path, name.lower(), echo(element))
        dtype = DATATYPES[name].numpy
        if dtype is None:
            sent[name] = np.array([["a", "ß\0"], ["", "𝛼 β"]], object)
        elif dtype.kind == "f":
            sent[name] = np.array([[0.1, np.nan], [-np.inf, 6e-8]], dtype)
        elif dtype.kind == "b":
            sent[name] = np.array([[True, False], [False, True]])
        else:
            limits = np.iinfo(dtype)
            sent[name] = np.array([[limits.min, limits.max], [1, 0]], dtype)
    server = serve(tmp_path)
    with Client(server.address) as client:
        assert {state.name: state.state for state in client.models()} == {name.lower(): "READY" for name in sent}
        for _ in range(2):  # the second time by what was remembered of the first
            for name, array in sent.items():
                got = client.predict(name.lower(), array)
                assert got.dtype == array.dtype and got.shape == array.shape, name
                assert got.tolist() == array.tolist() if got.dtype == object else got.tobytes() == array.tobytes(), name


def test_several_inputs_and_outputs(tmp_path: Path, serve: Serve) -> None:
    save(tmp_path, "pair", two_by_two())
    server = serve(tmp_path)
    a, n = np.arange(6.0).reshape(2, 3), np.array([[1], [2]], np.int32)
    with Client(server.address) as client:
        answer = client.infer("pair", {"n": n, "a": a})
        assert {name: array.tolist() for name, array in answer.items()} == {
            "sum": (a + n).tolist(), "most": [2.0, 5.0], "n_out": [[1], [2]],
        }  # fmt: skip
        assert list(client.infer("pair", {"n": n, "a": a}, outputs=["n_out", "most"])) == ["n_out", "most"]
        with pytest.raises(InvalidArgument, match="missing input 'n'"):
            client.infer("pair", {"a": a})
        with pytest.raises(InvalidArgument, match="has the inputs 'a', 'n'"):
            client.predict("pair", a)


def test_a_client_outlives_its_server_and_learns_of_a_changed_model(tmp_path: Path, serve: Serve) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    save(old, "m", echo())
    nodes = [helper.make_node("Neg", ["rows"], ["out"])]
    wide = ELEMENTS["FP64"]
    changed = network(nodes, [("rows", wide, ["batch", 2])], [("out", wide, ["batch", 2])])
    save(new, "m", changed, version=2)
    first = serve(old)
    with Client(first.address) as client:
        assert client.predict("m", [1.0, 2.0]).tolist() == [1.0, 2.0]
        first.stop()
        with pytest.raises(Unavailable):
            client.predict("m", [1.0, 2.0])
        # The same address: the client reconnects, is refused with what it remembers, asks, and sends what is wanted.
        serve(new, "--grpc-port", first.address.rpartition(":")[2])
        got = _until_there(lambda: client.predict("m", [1.0, 2.0]))
        assert got.dtype == np.float64 and got.tolist() == [-1.0, -2.0]


def _until_there(call: Callable[[], np.ndarray]) -> np.ndarray:
    """The answer, once the client's pauses between attempts to connect have passed."""
    for _ in range(20):
        try:
            return call()
        except Unavailable:
            continue
    return call()


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_one_of_two_servers_is_killed_and_no_call_fails(tmp_path: Path, serve: Serve, transport: str) -> None:
    save(tmp_path, "m", echo(FLOAT, ["batch", 4]))
    servers = [serve(tmp_path, "--transport", transport) for _ in range(2)]
    killed = threading.Event()

    def ask(client: Client, seed: int) -> None:
        rng = np.random.default_rng(seed)
        left = 100  # calls after the kill
        while left:
            x = rng.standard_normal((1 + seed % 3, 4)).astype(np.float32)
            assert client.predict("m", x).tobytes() == x.tobytes()
            left -= killed.is_set()

    with Client("ipv4:" + ",".join(server.address for server in servers)) as client:
        client.predict("m", np.zeros((1, 4), np.float32))
        with ThreadPoolExecutor(8) as threads:
            calls = [threads.submit(ask, client, seed) for seed in range(8)]
            while min(map(_requests, servers)) < 50 and not any(call.done() for call in calls):
                pass  # each look is an HTTP request: no need to pause
            servers[1].kill()
            killed.set()
            for call in calls:
                call.result(60)
    assert servers[0].stop() == 0


def _requests(server: ServerProcess) -> float:
    lines = server.metrics().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("forwardpass_requests_total{"))
