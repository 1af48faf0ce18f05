"""Streams of threads and of tasks against real servers behind each transport: order, errors, every kind of end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caller import Caller, request
from models import chain, hold, save, table

from forwardpass import AsyncClient, Client
from forwardpass.client import (
    Answer,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((300, 4)).astype(np.float32)
PATIENCE = 60.0  # seconds, for what should take a moment
LONG_RUN = 3e6  # turns of `hold`: seconds, on any machine


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    save(folder, "chain", chain())
    save(folder, "table", table())
    save(folder, "hold", hold(), "instances = 2\n")
    return folder


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def running(request: pytest.FixtureRequest, repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(repository, "--transport", request.param) as server:
        yield server
        assert server.stop() == 0, server.tail()


@pytest.fixture
def client(running: ServerProcess) -> Iterator[Client]:
    with Client(running.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def expected(running: ServerProcess) -> np.ndarray:
    with Client(running.address) as plain:
        return plain.predict("chain", ROWS)


@contextmanager
def frozen(server: ServerProcess) -> Iterator[None]:
    """The server's process is there, its ports are open, and nothing in it moves."""
    server.send(signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED)
    try:
        yield
    finally:
        server.send(signal.SIGCONT)


def until(done: Callable[[], bool]) -> None:
    """Ask until it is so, for a while."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        if done():
            return
        waiting.wait(0.02)
    raise AssertionError("it did not come to that")


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "forwardpass-stream"]


def test_many_requests_on_one_stream(client: Client, expected: np.ndarray) -> None:
    with client.stream() as stream:
        futures = [stream.submit("chain", ROWS[i : i + 1], id=f"row {i}") for i in range(300)]
    for i, future in enumerate(futures):
        answer = future.result(0)  # leaving the stream waited for it
        assert answer["y"].tobytes() == expected[i : i + 1].tobytes()
        assert (answer.id, answer.model, answer.version) == (f"row {i}", "chain", "1")
    assert not readers()


def test_many_threads_and_models_share_a_stream(client: Client, expected: np.ndarray) -> None:
    def ask(place: int) -> None:
        for i in range(30):
            row = (place * 11 + i) % 300
            if place % 2:
                got = stream.submit("chain", ROWS[row : row + 1]).result(PATIENCE)["y"]
                assert got.tobytes() == expected[row : row + 1].tobytes()
            else:
                assert stream.submit("table", [[row % 8]]).result(PATIENCE)["y"].tolist() == [[10.0 * (row % 8)]]

    with client.stream(in_flight=5) as stream, ThreadPoolExecutor(16) as threads:
        for call in [threads.submit(ask, place) for place in range(16)]:
            call.result(PATIENCE)


def test_tasks_share_a_stream(running: ServerProcess, expected: np.ndarray) -> None:
    async def main() -> None:
        async with AsyncClient(running.address) as client:
            async with client.stream(in_flight=7) as stream:
                answers = await asyncio.gather(
                    *(stream.infer("chain", ROWS[i : i + 1], id=str(i), outputs=["y"]) for i in range(300))
                )
            assert [answer.id for answer in answers] == [str(i) for i in range(300)]
            assert np.concatenate([answer["y"] for answer in answers]).tobytes() == expected.tobytes()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_map_gives_answers_in_order_and_takes_no_more_than_there_is_room_for(
    running: ServerProcess, client: Client, expected: np.ndarray
) -> None:
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        for row in ROWS:
            taken += 1
            yield row[np.newaxis]

    with client.stream(in_flight=4) as stream:
        answers = stream.map("chain", source())
        first = next(answers)
        assert taken <= 5
        got = [first["y"], *(answer["y"] for answer in answers)]
    assert np.concatenate(got).tobytes() == expected.tobytes()

    async def main() -> None:
        async def rows() -> Any:
            for row in ROWS:
                yield row[np.newaxis]

        async with AsyncClient(running.address) as other:
            for inputs in (rows(), (row[np.newaxis] for row in ROWS)):
                async with other.stream(in_flight=4) as stream:
                    got = [answer["y"] async for answer in stream.map("chain", inputs, outputs="y")]
                assert np.concatenate(got).tobytes() == expected.tobytes()

    asyncio.run(main())


REFUSALS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (InvalidArgument, "expected shape", {"model": "chain", "inputs": np.zeros((1, 3), np.float32)}),
    (InvalidArgument, "unknown output 'z'", {"model": "chain", "inputs": ROWS[:1], "outputs": ["z"]}),
    (InvalidArgument, "cannot be run on these values", {"model": "table", "inputs": [[99]]}),
    (NotFound, "99", {"model": "chain", "inputs": ROWS[:1], "version": "99"}),
]


@pytest.mark.parametrize(("error", "text", "wrong"), REFUSALS, ids=[text for _, text, _ in REFUSALS])
def test_an_error_is_typed_and_the_stream_goes_on(
    running: ServerProcess, client: Client, error: type[Exception], text: str, wrong: dict[str, Any]
) -> None:
    with client.stream() as stream:
        before = stream.submit("chain", ROWS[:1])
        with pytest.raises(error, match=text):
            stream.submit(**wrong).result(PATIENCE)
        before.result(PATIENCE)
        stream.submit("chain", ROWS[:1]).result(PATIENCE)

    async def main() -> None:
        async with AsyncClient(running.address) as other, other.stream() as stream:
            with pytest.raises(error, match=text):
                await stream.infer(**wrong)
            await stream.infer("chain", ROWS[:1])

    asyncio.run(main())


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_timeout_bounds_the_wait_for_an_instance(repository: Path, serve: Serve, transport: str) -> None:
    server = serve(repository, "--transport", transport, "--inline-run-limit", "0")
    caller, x = Caller(server), np.zeros((1, 1), np.float32)
    holders: list[Any] = []  # a call that is let go of is cancelled
    with Client(server.address) as client, client.stream() as stream:
        assert stream.submit("hold", x, timeout=1e-6).result(PATIENCE)["y"].tolist() == [[0.0]]
        for busy in (1, 2):  # one by one: together they would share a run
            holders.append(caller.start(request("hold", x + np.float32(1e15))))
            until(lambda busy=busy: caller.metric("forwardpass_running_requests") == busy)  # type: ignore[misc]
        with pytest.raises(DeadlineExceeded, match=r"its queue timeout is 0\.0 ms"):
            stream.submit("hold", x, timeout=1e-6).result(PATIENCE)
        stream.submit("chain", ROWS[:1]).result(PATIENCE)
        server.kill()
    caller.close()


def test_a_full_queue_says_when_to_come_back(repository: Path, serve: Serve) -> None:
    server = serve(repository, "--max-requests", "2")
    with Client(server.address) as client, client.stream(in_flight=64) as stream:
        stream.submit("chain", ROWS[:1]).result(PATIENCE)
        futures = [stream.submit("hold", np.full((1, 1), LONG_RUN / 100, np.float32)) for _ in range(64)]
        errors = [future.exception(PATIENCE) for future in futures]
    refused = [error for error in errors if error is not None]
    assert refused
    assert all(isinstance(error, ResourceExhausted) and error.retry_after for error in refused)


def test_who_sends_more_than_there_is_room_for_waits(running: ServerProcess, client: Client) -> None:
    with client.stream(in_flight=3) as stream, ThreadPoolExecutor(1) as threads:
        stream.submit("chain", ROWS[:1]).result(PATIENCE)
        with frozen(running):
            futures = [stream.submit("chain", ROWS[:1]) for _ in range(3)]
            waits = threads.submit(stream.submit, "chain", ROWS[:1])
            with pytest.raises(TimeoutError):
                waits.result(0.2)
            assert not any(future.done() for future in futures)
        waits.result(PATIENCE).result(PATIENCE)

    async def main() -> None:
        async with AsyncClient(running.address) as other, other.stream(in_flight=3) as stream:
            await stream.infer("chain", ROWS[:1])
            with frozen(running):
                futures = [await stream.submit("chain", ROWS[:1]) for _ in range(3)]
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(stream.submit("chain", ROWS[:1]), 0.2)
            await asyncio.wait(futures)
            await stream.infer("chain", ROWS[:1])

    asyncio.run(main())


def test_a_task_that_is_cancelled_leaves_and_the_stream_goes_on(running: ServerProcess) -> None:
    async def main() -> None:
        async with AsyncClient(running.address) as client, client.stream(in_flight=2) as stream:
            await stream.infer("chain", ROWS[:1])
            with frozen(running):
                tasks = [asyncio.create_task(stream.infer("chain", ROWS[:1])) for _ in range(4)]
                await asyncio.sleep(0.05)
                for task in tasks[::2]:
                    task.cancel()
                await asyncio.wait(tasks[::2])
            assert all(task.cancelled() for task in tasks[::2])
            for task in tasks[1::2]:
                assert (await task)["y"].shape == (1, 3)
            for _ in range(4):
                await stream.infer("chain", ROWS[:1])

    asyncio.run(main())


def unanswered(client: Client, server: ServerProcess) -> tuple[Any, list[Future[Answer]]]:
    """A stream with requests that are not answered soon."""
    stream = client.stream()
    stream.submit("chain", ROWS[:1]).result(PATIENCE)
    return stream, [stream.submit("hold", np.full((1, 1), 10 * LONG_RUN, np.float32)) for _ in range(3)]


def test_cancelling_ends_a_stream_at_once(running: ServerProcess, client: Client) -> None:
    stream, futures = unanswered(client, running)
    stream.cancel()
    assert all(isinstance(future.exception(0), Cancelled) for future in futures)
    with pytest.raises(ValueError, match="the stream is closed"):
        stream.submit("chain", ROWS[:1])
    stream.close()
    assert not readers()
    with pytest.raises(RuntimeError, match="mine"), client.stream() as stream:
        future = stream.submit("hold", np.full((1, 1), 10 * LONG_RUN, np.float32))
        raise RuntimeError("mine")
    assert isinstance(future.exception(0), Cancelled)

    async def main() -> None:
        async with AsyncClient(running.address) as other:
            with pytest.raises(RuntimeError, match="mine"):
                async with other.stream() as stream:
                    future = await stream.submit("hold", np.full((1, 1), 10 * LONG_RUN, np.float32))
                    raise RuntimeError("mine")
            assert isinstance(future.exception(), Cancelled)
            with pytest.raises(ValueError, match="the stream is closed"):
                await stream.submit("chain", ROWS[:1])

    asyncio.run(main())


def test_closing_the_client_ends_its_streams(running: ServerProcess) -> None:
    client = Client(running.address)
    _stream, futures = unanswered(client, running)
    client.close()
    assert all(isinstance(future.exception(PATIENCE), Cancelled) for future in futures)
    until(lambda: not readers())
    with pytest.raises(ValueError, match="the client is closed"):
        client.stream()

    async def main() -> None:
        other = AsyncClient(running.address)
        stream = other.stream()
        future = await stream.submit("hold", np.full((1, 1), 10 * LONG_RUN, np.float32))
        await other.close()
        with pytest.raises(Cancelled):
            await future

    asyncio.run(main())


def test_a_time_limit_ends_the_whole_stream(running: ServerProcess, client: Client) -> None:
    client.predict("chain", ROWS[:1])
    with client.stream(timeout=0.5) as stream:
        future = stream.submit("hold", np.full((1, 1), 10 * LONG_RUN, np.float32))
        # The client's own clock and the server's end it at the same moment; whichever comes first gives the words.
        with pytest.raises(DeadlineExceeded, match=rf"no answer from {running.address} within 0\.5|deadline passed"):
            future.result(PATIENCE)
        with pytest.raises(DeadlineExceeded):
            stream.submit("chain", ROWS[:1])


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_server_that_is_killed_fails_what_is_unanswered(repository: Path, serve: Serve, transport: str) -> None:
    server = serve(repository, "--transport", transport)
    with Client(server.address) as client:
        stream, futures = unanswered(client, server)
        server.kill()
        assert all(isinstance(future.exception(PATIENCE), Unavailable) for future in futures)
        with pytest.raises(Unavailable):
            stream.submit("chain", ROWS[:1])
        stream.close()


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_server_that_drains_answers_what_it_read_and_ends_the_stream(
    repository: Path, serve: Serve, transport: str
) -> None:
    server = serve(repository, "--transport", transport)
    with Client(server.address) as client:
        stream = client.stream()
        stream.submit("chain", ROWS[:1]).result(PATIENCE)
        running = stream.submit("hold", np.full((1, 1), LONG_RUN / 20, np.float32))
        until(lambda: "forwardpass_in_flight_requests 1.0" in server.metrics())
        assert server.stop() == 0
        assert running.result(PATIENCE)["y"].tolist() == [[LONG_RUN / 20]]
        with pytest.raises(Unavailable):
            while True:
                stream.submit("chain", ROWS[:1]).result(PATIENCE)
        stream.close()


def test_room_for_nothing_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="in_flight: expected at least 1, got 0"):
        client.stream(in_flight=0)
