"""Calls of many threads and of many tasks that share requests, against real servers behind each transport."""

from __future__ import annotations

import asyncio
import gc
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
from models import FLOAT, centred, echo, hold, save, table

from forwardpass import AsyncClient, Client
from forwardpass.client import (
    Cancelled,
    Coalesce,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from forwardpass.client.coalescing_threads import PipeBell
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

RNG = np.random.default_rng(0)
ROWS = RNG.integers(0, 17, (256, 64)).astype(np.float32)
PATIENCE = 60.0  # seconds, for what should take a moment


@pytest.fixture(scope="module")
def expected(digits_repository: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(digits_repository / "digits" / "1" / "model.onnx")
    # Row by row: what each caller would have got alone.
    return np.concatenate([session.run(None, {"x": row[np.newaxis]})[0] for row in ROWS])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coalesced")
    save(folder, "table", table())
    save(folder, "hold", hold())
    save(folder, "centred", centred())
    save(folder, "echo", echo(FLOAT, ["batch", "width"]))
    return folder


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def running(request: pytest.FixtureRequest, repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(repository, "--transport", request.param) as server:
        yield server
        assert server.stop() == 0, server.tail()


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


def waiting(client: Client | AsyncClient) -> int:
    """Callers whose rows nobody has taken yet."""
    assert client._coalescer is not None
    groups = client._coalescer._coalescer._groups.values()
    return sum(not rows.gone for group in groups for batch in group.batches for rows in batch.rows)


def came(client: Client | AsyncClient) -> int:
    """Callers whose rows nobody has taken yet, those among them that have left."""
    assert client._coalescer is not None
    return sum(len(batch.rows) for group in client._coalescer._coalescer._groups.values() for batch in group.batches)


def senders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "forwardpass-sender"]


def test_64_threads_get_their_own_rows_bit_for_bit(server: ServerProcess, expected: np.ndarray) -> None:
    def ask(client: Client, place: int) -> None:
        for i in range(40):
            row = (place * 7 + i) % 256
            got = client.predict("digits", ROWS[row])
            assert got.shape == (10,) and got.tobytes() == expected[row].tobytes()
            got[:] = -1  # its own: nobody else's row changes

    with Client(server.address, coalesce=Coalesce()) as client, ThreadPoolExecutor(64) as threads:
        for call in [threads.submit(ask, client, place) for place in range(64)]:
            call.result(PATIENCE)
        counts = client.counts
    assert counts.retries == 0
    assert counts.shared_rows > 2 * counts.shared_requests, "hardly any request had more than a row"
    assert not senders()


def test_64_tasks_get_their_own_rows_bit_for_bit(server: ServerProcess, expected: np.ndarray) -> None:
    async def ask(client: AsyncClient, place: int) -> None:
        for i in range(40):
            row = (place * 7 + i) % 256
            got = await client.predict("digits", ROWS[row])
            assert got.shape == (10,) and got.tobytes() == expected[row].tobytes()

    async def main() -> None:
        async with AsyncClient(server.address, coalesce=Coalesce()) as client:
            await asyncio.gather(*(ask(client, place) for place in range(64)))
            assert client.counts.shared_rows > 10 * client.counts.shared_requests
            assert len(asyncio.all_tasks()) == 1, "senders stayed when there was nothing to send"

    asyncio.run(main())


@pytest.mark.parametrize(
    "options",
    [
        {"max_rows": 3, "max_wait": 0.0, "in_flight": 1},
        {"max_rows": 64, "max_wait": 0.0, "in_flight": 16},
        {"max_rows": 7, "max_wait": 0.5, "in_flight": 2},
        {"max_bytes": 1024},
    ],
    ids=str,
)
def test_every_bound_leaves_everybody_their_own(
    server: ServerProcess, expected: np.ndarray, options: dict[str, Any]
) -> None:
    # Rows and small batches, in the model's dtype and in another, some in more of a hurry.
    def ask(client: Client, place: int) -> None:
        for i in range(30):
            row, count = (place * 7 + i) % 250, place % 4
            x = ROWS[row : row + count] if count else ROWS[row]
            want = expected[row : row + count] if count else expected[row]
            got = client.predict("digits", x if i % 3 else x.astype(np.int64), timeout=30.0 if place % 8 else 10.0)
            assert got.tobytes() == want.tobytes() and got.shape == want.shape

    with Client(server.address, coalesce=Coalesce(**options)) as client, ThreadPoolExecutor(24) as threads:
        for call in [threads.submit(ask, client, place) for place in range(24)]:
            call.result(PATIENCE)


def test_who_is_alone_is_not_delayed_and_shares_nothing(server: ServerProcess) -> None:
    with Client(server.address, coalesce=Coalesce(max_wait=PATIENCE)) as client:
        for row in ROWS[:20]:
            client.predict("digits", row)
        assert client.counts.shared_requests == 0
        assert not senders()


def crowd(client: Client | AsyncClient) -> None:
    """From now on callers gather, as if there were many of them."""
    assert client._coalescer is not None
    for group in client._coalescer._coalescer._groups.values():
        group.crowd = 64.0


@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_poisoned_row_does_its_neighbours_no_harm(running: ServerProcess, place: int) -> None:
    indices = [i % 8 for i in range(16)]
    indices[place] = 99  # out of the table
    with Client(running.address, coalesce=Coalesce(in_flight=1)) as client, ThreadPoolExecutor(17) as threads:
        client.predict("table", np.array([0]))
        crowd(client)
        with frozen(running):
            first = threads.submit(client.predict, "table", np.array([1]))
            until(lambda: client.counts.shared_requests == 1)
            calls = [threads.submit(client.predict, "table", np.array([i])) for i in indices]
            until(lambda: waiting(client) == 16)
        assert first.result(PATIENCE).tolist() == [10.0]
        with pytest.raises(InvalidArgument, match="cannot be run on these values"):
            calls[place].result(PATIENCE)
        for i, call in enumerate(calls):
            if i != place:
                assert call.result(PATIENCE).tolist() == [10.0 * indices[i]]
        assert client.counts.shared_rows == 17 and client.counts.shared_requests == 2


def test_a_wrong_model_or_shape_is_what_it_is_without_sharing(server: ServerProcess) -> None:
    with Client(server.address, coalesce=Coalesce()) as client, ThreadPoolExecutor(8) as threads:
        wrong: list[tuple[type[Exception], dict[str, Any]]] = [
            (NotFound, {"model": "nobody", "x": ROWS[0]}),
            (NotFound, {"model": "digits", "x": ROWS[0], "version": "99"}),
            (InvalidArgument, {"model": "digits", "x": ROWS[0, :5]}),
            (InvalidArgument, {"model": "digits", "x": np.array(["a"] * 64)}),
            (InvalidArgument, {"model": "digits", "x": ROWS[0], "output": "nothing"}),
        ]
        client.predict("digits", ROWS[0])
        for error, arguments in wrong:
            calls = [threads.submit(client.predict, **arguments) for _ in range(8)]
            for call in calls:
                with pytest.raises(error):
                    call.result(PATIENCE)
        client.predict("digits", ROWS[0])


HASTY = 2.0  # seconds; the others have all the time there is


def one_group(client: Client | AsyncClient) -> None:
    """However long they can wait, callers share requests: only limits within a factor of two of each other would."""
    assert client._coalescer is not None
    coalescer = client._coalescer._coalescer
    group = coalescer.group
    coalescer.group = lambda key: group(key._replace(urgency=None))


def test_the_deadline_of_one_who_waits_is_not_that_of_the_others(running: ServerProcess) -> None:
    with Client(running.address, coalesce=Coalesce(in_flight=1)) as client, ThreadPoolExecutor(8) as threads:
        x = np.zeros(1, np.float32)
        one_group(client)
        client.predict("hold", x, timeout=PATIENCE)
        crowd(client)
        with frozen(running):
            first = threads.submit(client.predict, "hold", x, timeout=PATIENCE)
            until(lambda: client.counts.shared_requests == 1)
            hasty = threads.submit(client.predict, "hold", x, timeout=HASTY)
            until(lambda: came(client) == 1)
            patient = [threads.submit(client.predict, "hold", x, timeout=PATIENCE) for _ in range(3)]
            until(lambda: came(client) == 4)
            with pytest.raises(DeadlineExceeded, match=rf"no answer from {running.address} within {HASTY:g} s"):
                hasty.result(PATIENCE)
            assert not first.done() and not any(call.done() for call in patient)
        assert first.result(PATIENCE).tolist() == [0.0]
        assert [call.result(PATIENCE).tolist() for call in patient] == [[0.0]] * 3
        assert client.counts.shared_rows == 4, "the row of one who had left was sent"


def test_the_deadline_of_one_in_a_request_is_not_that_of_the_others(running: ServerProcess) -> None:
    async def main() -> None:
        async with AsyncClient(running.address, coalesce=Coalesce(in_flight=1)) as client:
            x = np.zeros(1, np.float32)
            one_group(client)
            await client.predict("hold", x, timeout=PATIENCE)
            crowd(client)
            with frozen(running):
                limits = (PATIENCE, HASTY, PATIENCE)
                calls = [asyncio.create_task(client.predict("hold", x, timeout=limit)) for limit in limits]
                while client.counts.shared_requests == 0:
                    await asyncio.sleep(0)
                assert client.counts.shared_rows == 3
                with pytest.raises(DeadlineExceeded, match=rf"no answer from {running.address} within {HASTY:g} s"):
                    await calls[1]
                assert not calls[0].done() and not calls[2].done()
            assert [(await calls[place]).tolist() for place in (0, 2)] == [[0.0], [0.0]]

    asyncio.run(main())


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_who_is_in_a_hurry_does_not_wait_for_those_who_are_not(repository: Path, serve: Serve, transport: str) -> None:
    server = serve(repository, "--transport", transport, "--inline-run-limit", "0", "--instances", "2")
    with Client(server.address, coalesce=Coalesce(in_flight=1), attempts=1) as client, ThreadPoolExecutor(2) as threads:
        x = np.zeros(1, np.float32)
        patient, hurried = 4 * PATIENCE, PATIENCE
        for timeout in (patient, hurried):
            client.predict("hold", x, timeout=timeout)
        crowd(client)
        # The one request of the patient ones that may be under way stays so until the server is killed.
        long = threads.submit(client.predict, "hold", np.full(1, 1e15, np.float32), timeout=patient)
        until(lambda: client.counts.shared_requests == 1)
        held = threads.submit(client.predict, "hold", x, timeout=patient)
        until(lambda: waiting(client) == 1)
        assert client.predict("hold", x, timeout=hurried).tolist() == [0.0]
        assert waiting(client) == 1 and not held.done() and not long.done()
        server.kill()
        for call in (long, held):
            with pytest.raises(Unavailable):
                call.result(PATIENCE)


def test_a_task_that_is_cancelled_leaves_alone(running: ServerProcess) -> None:
    async def main() -> None:
        async with AsyncClient(running.address, coalesce=Coalesce(in_flight=1)) as client:
            x = np.zeros(1, np.float32)
            await client.predict("hold", x)
            crowd(client)
            with frozen(running):
                sent = [asyncio.create_task(client.predict("hold", x)) for _ in range(4)]
                while client.counts.shared_requests == 0:
                    await asyncio.sleep(0)
                held = [asyncio.create_task(client.predict("hold", x)) for _ in range(4)]
                while waiting(client) < 4:
                    await asyncio.sleep(0)
                for task in (sent[1], held[0], held[2]):
                    task.cancel()
                done, _ = await asyncio.wait([sent[1], held[0], held[2]], timeout=PATIENCE)
                assert len(done) == 3 and all(task.cancelled() for task in done)
            rest = [task for task in (*sent, *held) if task not in done]
            assert [answer.tolist() for answer in await asyncio.gather(*rest)] == [[0.0]] * 5
            assert client.counts.shared_rows == 6, "who left before its rows were sent was sent"

    asyncio.run(main())


def test_a_model_whose_rows_depend_on_each_other_is_not_shared(running: ServerProcess) -> None:
    # Each row less the mean of its request: alone, that is nothing.
    with Client(running.address, coalesce=Coalesce()) as client, ThreadPoolExecutor(16) as threads:
        rows = RNG.standard_normal((64, 3)).astype(np.float32)
        for got in threads.map(lambda row: client.predict("centred", row), rows):
            assert got.tolist() == [0.0, 0.0, 0.0]
        assert client.counts.shared_requests == 0


def test_rows_of_different_widths_are_not_mixed(running: ServerProcess) -> None:
    with Client(running.address, coalesce=Coalesce()) as client, ThreadPoolExecutor(32) as threads:
        rows = [RNG.standard_normal(1 + i % 3).astype(np.float32) for i in range(600)]
        for row, got in zip(rows, threads.map(lambda row: client.predict("echo", row), rows), strict=True):
            assert got.tobytes() == row.tobytes()


def test_a_server_that_is_killed_fails_all_who_wait(repository: Path, serve: Serve) -> None:
    server = serve(repository)
    with Client(server.address, coalesce=Coalesce(in_flight=1), attempts=1) as client, ThreadPoolExecutor(8) as threads:
        x = np.zeros(1, np.float32)
        client.predict("hold", x)
        crowd(client)
        long = np.full(1, 30e6, np.float32)  # turns of a loop: far longer than it takes to kill it
        first = threads.submit(client.predict, "hold", long)
        until(lambda: client.counts.shared_requests == 1)
        calls = [threads.submit(client.predict, "hold", x) for _ in range(6)]
        until(lambda: waiting(client) == 6)
        server.kill()
        for call in (first, *calls):
            with pytest.raises(Unavailable, match=server.address):
                call.result(PATIENCE)


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_one_of_two_servers_is_killed_and_no_call_fails(tmp_path: Path, serve: Serve, transport: str) -> None:
    save(tmp_path, "m", echo(FLOAT, ["batch", 4]))
    servers = [serve(tmp_path, "--transport", transport) for _ in range(2)]
    killed = threading.Event()

    def ask(client: Client, seed: int) -> None:
        rng = np.random.default_rng(seed)
        left = 50  # calls after the kill
        while left:
            x = rng.standard_normal(4).astype(np.float32)
            assert client.predict("m", x).tobytes() == x.tobytes()
            left -= killed.is_set()

    with Client("ipv4:" + ",".join(server.address for server in servers), coalesce=Coalesce()) as client:
        client.predict("m", np.zeros(4, np.float32))
        with ThreadPoolExecutor(32) as threads:
            calls = [threads.submit(ask, client, seed) for seed in range(32)]
            until(lambda: client.counts.shared_requests > 50)
            servers[1].kill()
            killed.set()
            for call in calls:
                call.result(PATIENCE)
    assert servers[0].stop() == 0


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_server_that_drains_answers_what_it_has_and_no_call_fails(
    tmp_path: Path, serve: Serve, transport: str
) -> None:
    save(tmp_path, "m", echo(FLOAT, ["batch", 4]))
    going, staying = (serve(tmp_path, "--transport", transport, "--drain-wait", "0.5") for _ in range(2))
    over = threading.Event()

    def ask(client: Client, seed: int) -> int:
        rng = np.random.default_rng(seed)
        count = 0
        while not over.is_set():
            x = rng.standard_normal(4).astype(np.float32)
            assert client.predict("m", x).tobytes() == x.tobytes()
            count += 1
        return count

    with Client(f"ipv4:{going.address},{staying.address}", coalesce=Coalesce()) as client:
        client.predict("m", np.zeros(4, np.float32))
        with ThreadPoolExecutor(16) as threads:
            calls = [threads.submit(ask, client, seed) for seed in range(16)]
            try:
                until(lambda: client.counts.shared_requests > 50)
                assert going.stop() == 0
                after = client.counts.shared_requests
                until(lambda: client.counts.shared_requests > after + 50 or any(call.done() for call in calls))
            finally:
                over.set()
            assert min(call.result(PATIENCE) for call in calls) > 0


def test_closing_settles_every_call_and_leaves_no_thread(running: ServerProcess) -> None:
    client = Client(running.address, coalesce=Coalesce(in_flight=2))
    x = np.zeros(1, np.float32)
    client.predict("hold", x)
    crowd(client)
    with frozen(running), ThreadPoolExecutor(16) as threads:
        calls = [threads.submit(client.predict, "hold", x)]
        until(lambda: client.counts.shared_requests == 1)
        calls += [threads.submit(client.predict, "hold", x) for _ in range(3)]
        until(lambda: client.counts.shared_requests == 2)
        calls += [threads.submit(client.predict, "hold", x) for _ in range(12)]
        until(lambda: client.counts.shared_rows + waiting(client) == 16)
        client.close()
        for call in calls:
            with pytest.raises(Cancelled, match="closed"):
                call.result(PATIENCE)
    assert not senders()
    with pytest.raises(ValueError, match="the client is closed"):
        client.predict("hold", x)


def test_closing_an_async_client_settles_every_call(running: ServerProcess) -> None:
    async def main() -> None:
        client = AsyncClient(running.address, coalesce=Coalesce(in_flight=1))
        x = np.zeros(1, np.float32)
        await client.predict("hold", x)
        with frozen(running):
            calls = [asyncio.create_task(client.predict("hold", x)) for _ in range(8)]
            while waiting(client) < 7:
                await asyncio.sleep(0)
            await client.close()
            for result in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(result, Cancelled), result
        assert len(asyncio.all_tasks()) == 1
        with pytest.raises(ValueError, match="the client is closed"):
            await client.predict("hold", x)

    asyncio.run(main())


def test_nothing_is_left_behind(server: ServerProcess) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with Client(server.address, coalesce=Coalesce()) as client, ThreadPoolExecutor(32) as threads:
        gc.disable()  # what is closed is closed without it
        try:
            counted = []
            for _ in range(3):
                list(threads.map(lambda row: client.predict("digits", row), np.tile(ROWS, (4, 1))))
                counted.append(descriptors())
        finally:
            gc.enable()
        assert client.counts.shared_requests > 10
        assert counted[2] <= counted[0] + 8, f"descriptors pile up: {counted}"
        assert len(senders()) <= 4


def test_without_descriptors_callers_are_woken_all_the_same(
    server: ServerProcess, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    with Client(server.address, coalesce=Coalesce()) as client, ThreadPoolExecutor(16) as threads:
        client.predict("digits", ROWS[0])
        monkeypatch.setattr(os, "pipe", none_left)
        answers = list(threads.map(lambda row: client.predict("digits", row), ROWS))
        monkeypatch.undo()
        assert np.stack(answers).tobytes() == expected.tobytes()
        assert client.counts.shared_requests > 0


def test_a_bell_wakes_all_and_stays_rung() -> None:
    bell = PipeBell()
    woken = [threading.Thread(target=bell.wait, args=(PATIENCE,)) for _ in range(8)]
    for thread in woken:
        thread.start()
    bell.ring(())
    for thread in woken:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in woken)
    bell.wait(float("inf"))
    PipeBell().wait(0.001)
