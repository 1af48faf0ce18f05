"""The HTTP port's timers and bounds, over real connections, with the limits made small."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from forwardpass import protocol
from forwardpass.errors import RunFailed
from forwardpass.transport.interface import CallContext, Handler
from forwardpass.transport.rest import bodies, connection
from forwardpass.transport.rest import server as rest
from forwardpass.transport.rest.application import RestApplication, RestLimits
from forwardpass.transport.rest.server import RestServer

REQUEST = json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}).encode()
Answer = Callable[[CallContext], Awaitable[bytes]]


async def answer(context: CallContext) -> bytes:
    """As large as the request's id says."""
    request = protocol.ModelInferRequest.FromString(await context.read() or b"")
    response = protocol.ModelInferResponse(model_name="m", raw_output_contents=[bytes(int(request.id or 4))])
    response.outputs.add(name="y", datatype="INT8", shape=[int(request.id or 4)])
    message: bytes = response.SerializeToString()
    return message


@asynccontextmanager
async def running(
    infer: Answer = answer, most: int = 100, budget: int = 1 << 20
) -> AsyncIterator[tuple[RestServer, int]]:
    handlers = {name: Handler(infer, False) for name in protocol.METHODS}
    services = {protocol.INFERENCE_SERVICE: handlers, protocol.HEALTH_SERVICE: {"Check": Handler(infer, False)}}
    server = RestServer(RestApplication(services, RestLimits(10 << 20, budget)), 4096, most)
    port = server.listen("127.0.0.1", 0)
    server.start()
    try:
        yield server, port
    finally:
        await server.stop(1.0)


def head(length: int) -> bytes:
    return f"POST /v2/models/m/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {length}\r\n\r\n".encode()


async def exchange(port: int, *data: bytes) -> bytes:
    """Everything that the server says until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(data))
    try:
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()


def test_a_head_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)

    async def run() -> None:
        async with running() as (_, port):
            assert await exchange(port) == b""
            late = await exchange(port, head(5)[:20])
            assert late.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.05 s" in late
            # The timer begins anew with each request of a connection.
            late = await exchange(port, head(len(REQUEST)) + REQUEST + head(5)[:20])
            assert late.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in late

    asyncio.run(run())


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)

    async def run() -> None:
        async with running() as (_, port):
            late = await exchange(port, head(10) + b"12345")
            assert late.startswith(b"HTTP/1.1 400") and b"connection: close" in late
            assert b"the body did not arrive within 0.05 s" in late

    asyncio.run(run())


def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "IDLE_SECONDS", 1.0)

    async def run() -> None:
        async with running() as (_, port):
            assert (await exchange(port, head(len(REQUEST)) + REQUEST)).startswith(b"HTTP/1.1 200")

    asyncio.run(run())


@pytest.mark.parametrize(
    "request_and_more",
    [
        (b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\n\r\n", b"\r\n"),
        (b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n", b"part"),
    ],
    ids=["an empty line", "a part of a body that nobody asked for"],
)
def test_what_is_no_request_keeps_no_connection(
    monkeypatch: pytest.MonkeyPatch, request_and_more: tuple[bytes, bytes]
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)
    first, more = request_and_more

    async def run() -> None:
        async with running() as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(first)
            assert (await reader.readuntil(b'{"live":true}')).startswith(b"HTTP/1.1 200")
            writer.write(more)
            async with asyncio.timeout(30):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(run())


def test_what_no_client_takes_is_counted() -> None:
    body = json.dumps(json.loads(REQUEST) | {"id": str(8 << 20)}).encode()

    async def run() -> None:
        async with running(budget=1 << 20) as (_, port):
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(("127.0.0.1", port))
                sock.sendall(head(len(body)) + body)
                async with asyncio.timeout(30):
                    while not (refused := await once(port)).startswith(b"HTTP/1.1 429"):
                        assert refused.startswith(b"HTTP/1.1 200")
                assert b"being received or sent" in refused
            async with asyncio.timeout(30):
                while not (await once(port)).startswith(b"HTTP/1.1 200"):
                    pass

    async def once(port: int) -> bytes:
        return await exchange(port, head(len(REQUEST)).replace(b"Host", b"Connection: close\r\nHost") + REQUEST)

    asyncio.run(run())


def test_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.05)
    body = json.dumps(json.loads(REQUEST) | {"id": str(8 << 20)}).encode()

    async def run() -> None:
        async with running() as (server, port):
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(("127.0.0.1", port))
                sock.sendall(head(len(body)) + body)
                while not server.connections:
                    await asyncio.sleep(0.01)
                async with asyncio.timeout(30):
                    while server.connections:
                        await asyncio.sleep(0.01)

    asyncio.run(run())


def test_connections_are_bounded() -> None:
    async def run() -> None:
        async with running(most=2) as (server, port):
            first = await asyncio.open_connection("127.0.0.1", port)
            second = await asyncio.open_connection("127.0.0.1", port)
            while server.connections < 2:
                await asyncio.sleep(0.01)
            assert await exchange(port, head(len(REQUEST)) + REQUEST) == b""
            first[1].close()
            while server.connections > 1:
                await asyncio.sleep(0.01)
            third = await asyncio.open_connection("127.0.0.1", port)
            third[1].write(head(len(REQUEST)) + REQUEST)
            assert (await third[0].readline()).startswith(b"HTTP/1.1 200")
            second[1].close()
            third[1].close()

    asyncio.run(run())


def test_bodies_that_arrive_together_are_bounded() -> None:
    async def run() -> None:
        async with running(budget=100_000) as (_, port):
            slow = await asyncio.open_connection("127.0.0.1", port)
            slow[1].write(head(80_000) + bytes(60_000))
            refused = b""
            while not refused:  # until the server has read of the first
                got = await exchange(port, head(50_000) + bytes(50_000), b"GET /v2/health/live HTTP/1.0\r\n\r\n")
                refused = got if got.startswith(b"HTTP/1.1 429") else b""
            assert (
                b"retry-after: 1" in refused
                and b"bytes of bodies are being received or sent, the bound is 100000" in refused
            )
            slow[1].write(bytes(20_000))
            assert (await slow[0].readline()).startswith(b"HTTP/1.1 400"), "not JSON, but read to its end"
            slow[1].close()

    asyncio.run(run())


def test_a_handler_that_fails_says_nothing_internal(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_context: CallContext) -> bytes:
        raise KeyError("secret")

    async def failing(_context: CallContext) -> bytes:
        raise RunFailed("the network could not be run")

    async def run(infer: Answer, text: bytes) -> None:
        async with running(infer) as (_, port):
            got = await exchange(port, head(len(REQUEST)) + REQUEST, b"GET /v2/health/live HTTP/1.0\r\n\r\n")
            assert got.startswith(b"HTTP/1.1 500") and text in got and b"secret" not in got

    asyncio.run(run(broken, b"internal error; the server's log has the details"))
    assert "secret" in caplog.text
    asyncio.run(run(failing, b"the network could not be run"))


def test_a_stopping_server_answers_what_it_has() -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def waiting(context: CallContext) -> bytes:
        began.set()
        await go.wait()
        return await answer(context)

    async def run() -> None:
        async with running(waiting) as (server, port):
            idle = await asyncio.open_connection("127.0.0.1", port)
            exchanging = asyncio.create_task(exchange(port, head(len(REQUEST)) + REQUEST))
            await began.wait()
            stopping = asyncio.create_task(server.stop(30.0))
            await asyncio.sleep(0)
            go.set()
            got = await exchanging
            assert got.startswith(b"HTTP/1.1 200") and b"connection: close" in got
            await stopping
            assert await idle[0].read() == b""
            with pytest.raises(OSError, match=r"refused|111"):
                await asyncio.open_connection("127.0.0.1", port)
            idle[1].close()

    asyncio.run(run())
