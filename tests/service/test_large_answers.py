"""Answers of 64 KiB to 15.9 MiB at the direct transport, over plaintext, TLS and mutual TLS.

And what one connection that goes wrong does to the others: nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import http2_frames as http2
import models
import numpy as np
import pytest
from caller import INFER, outputs, request, threads, until
from certificates import Authority, Pair
from raw_client import HELLO, RawClient

from forwardpass.testing.server_process import ServerProcess

MIB = 1 << 20
SIZES = (1 << 16, 1 << 18, MIB, 4 * MIB, 8 * MIB, int(15.9 * MIB))  # bytes of a tensor
ORDERS = (SIZES, SIZES[::-1], (8 * MIB, 1 << 16, int(15.9 * MIB), MIB), (4 * MIB,) * 3)
SECONDS = 60.0
WIDE = http2.settings(initial_window_size=(1 << 31) - 1) + http2.window_update(0, (1 << 31) - 1 - 65535)


class Served:
    """A server of y = x, and how its clients connect."""

    def __init__(self, server: ServerProcess, authority: Authority | None, own: Pair | None) -> None:
        self.server = server
        self._authority, self._own = authority, own

    def channel(self) -> grpc.Channel:
        """A fresh connection, whatever others there are."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        if self._authority is None:
            return grpc.insecure_channel(self.server.address, options)
        own = (self._own.key.read_bytes(), self._own.certificate.read_bytes()) if self._own else (None, None)
        credentials = grpc.ssl_channel_credentials(self._authority.certificate.read_bytes(), *own)
        return grpc.secure_channel(self.server.address, credentials, options)

    def raw(self, receive_buffer: int = 0) -> RawClient:
        """A connection that reads as little as a test likes."""
        return RawClient(self.server.address, secure=self._context(), receive_buffer=receive_buffer)

    def _context(self) -> ssl.SSLContext | None:
        if self._authority is None:
            return None
        context = ssl.create_default_context(cafile=str(self._authority.certificate))
        context.set_alpn_protocols(["h2"])
        if self._own is not None:
            context.load_cert_chain(self._own.certificate, self._own.key)
        return context


def message(nbytes: int) -> bytes:
    x = np.resize(np.random.default_rng(nbytes).standard_normal(1 << 14).astype(np.float32), (1, nbytes // 4))
    data: bytes = request("any", np.abs(x)).SerializeToString()
    return data


MESSAGES = {nbytes: message(nbytes) for nbytes in SIZES}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "any", models.relu_any_width())
    return root


@pytest.fixture(scope="module", params=["plain", "TLS", "mTLS"])
def served(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options: list[str] = []
    authority = own = None
    if request.param != "plain":
        authority = Authority(tmp_path_factory.mktemp("authority"))
        pair = authority.issue("server")
        options = ["--tls-certificate", str(pair.certificate), "--tls-key", str(pair.key)]
    if request.param == "mTLS":
        assert authority is not None
        own = authority.issue("client")
        options += ["--tls-client-ca", str(authority.certificate)]
    with ServerProcess(repository, "--transport", "direct", *options) as server:
        yield Served(server, authority, own)
        assert server.stop() == 0, server.tail()
        assert not [line for line in server.lines if "Traceback" in line], server.tail()


def asked(channel: grpc.Channel, data: bytes) -> bytes:
    answer: bytes = channel.unary_unary(INFER)(data, timeout=SECONDS)
    return answer


def is_echo(answer: bytes, nbytes: int) -> bool:
    data = outputs(answer)[0].tobytes()
    return len(data) == nbytes // 4 * 4 and MESSAGES[nbytes].endswith(data)


@pytest.mark.parametrize("order", range(len(ORDERS)))
def test_every_size_in_any_order_on_a_fresh_connection(served: Served, order: int) -> None:
    with served.channel() as channel:
        for nbytes in ORDERS[order]:
            assert is_echo(asked(channel, MESSAGES[nbytes]), nbytes)


def test_large_answers_side_by_side_on_one_connection(served: Served) -> None:
    with served.channel() as channel:

        def call(i: int) -> None:
            for nbytes in itertools.islice(itertools.cycle(SIZES[i:]), 4):
                assert is_echo(asked(channel, MESSAGES[nbytes]), nbytes)

        with threads(4, call):
            pass


def opened(client: RawClient, nbytes: int) -> None:
    """Ask for an answer with windows for all of it, and take its headers."""
    client.greet(WIDE)
    client.send(client.call(1, MESSAGES[nbytes]))
    for kind, _, stream, _ in client.frames():
        if (kind, stream) == (http2.HEADERS, 1):
            return
    raise AssertionError("the connection was closed")


def reset(client: RawClient) -> None:
    """Close so that the server hears of it by a reset."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@contextlib.contextmanager
def neighbours(served: Served, count: int = 4) -> Iterator[Callable[[], int]]:
    """Callers that verify every answer while inside, on connections of their own; how many answers they have had."""
    answered, over = [0] * count, False

    def call(i: int) -> None:
        nbytes = SIZES[i % 2]
        with served.channel() as channel:
            while not over:
                assert is_echo(asked(channel, MESSAGES[nbytes]), nbytes)
                answered[i] += 1

    with threads(count, call):
        try:
            until(lambda: all(answered))
            yield lambda: sum(answered)
        finally:
            over = True


@pytest.mark.parametrize("nbytes", [MIB, 8 * MIB])
def test_a_slow_reader_gets_all_of_it_and_keeps_nobody(served: Served, nbytes: int) -> None:
    client = served.raw(receive_buffer=1 << 14)
    with served.channel() as other:
        opened(client, nbytes)
        body, taken = b"", 0
        for kind, flags, _, payload in client.frames():
            if kind == http2.DATA:
                body += payload
            if len(body) - taken > MIB // 2:
                taken = len(body)
                assert is_echo(asked(other, MESSAGES[1 << 16]), 1 << 16)
            if kind == http2.HEADERS and flags & http2.END_STREAM:
                break
        assert is_echo(body[5:], nbytes)
    client.close()


def test_a_connection_that_is_reset_under_its_answer_takes_nobody_along(served: Served) -> None:
    with neighbours(served) as answered:
        for i in range(20):
            client = served.raw(receive_buffer=1 << 14)
            opened(client, (MIB, 8 * MIB)[i % 2])
            reset(client)
        before = answered()
        until(lambda: answered() > before + 20, "further answers")


def test_a_call_that_is_reset_under_its_answer_leaves_its_connection_usable(served: Served) -> None:
    client = served.raw(receive_buffer=1 << 14)
    opened(client, 8 * MIB)
    client.send(http2.reset(1, http2.CANCEL), client.call(3, MESSAGES[1 << 16]))
    assert client.status(3) == "0"
    client.close()


@pytest.mark.parametrize("hello", [b"", HELLO[:10], HELLO], ids=["nothing", "half a preface", "a preface"])
def test_a_probe_that_connects_and_closes_takes_nobody_along(served: Served, hello: bytes) -> None:
    """As load balancers probe a port: all of the handshake, and a reset at once."""
    with neighbours(served) as answered:
        for _ in range(100):
            client = served.raw()
            client.send(hello)
            reset(client)
        before = answered()
        until(lambda: answered() > before + 20, "further answers")
