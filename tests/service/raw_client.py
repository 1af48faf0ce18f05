"""A client that says whatever bytes a test likes over a socket, and reads HTTP/2 frames back."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator
from typing import Any

import hpack
import http2_frames as http2

from forwardpass import protocol

INFER = protocol.METHODS["ModelInfer"].path
HELLO = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0)


class RawClient:
    """One connection. What it reads has a time limit; `closed` says that the server ended the connection."""

    def __init__(
        self, address: str, seconds: float = 30.0, secure: ssl.SSLContext | None = None, receive_buffer: int = 0
    ) -> None:
        """`secure`: speak TLS by it. `receive_buffer`: bytes that the system keeps for this client; 0: as it likes."""
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(seconds)
        self.socket.connect((host, int(port)))
        if secure is not None:
            self.socket = secure.wrap_socket(self.socket, server_hostname=host)
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._data = b""
        self.closed = False

    def send(self, *data: bytes) -> None:
        """A server that has had enough closes the connection; what is sent after that goes nowhere."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(b"".join(data))

    def greet(self, *frames: bytes) -> None:
        """Begin with these frames, and go on once the server's settings are known: they open the calls' windows."""
        self.send(http2.PREFACE, *(frames or (http2.frame(http2.SETTINGS, 0, 0),)))
        for kind, flags, _, _ in self.frames():
            if kind == http2.SETTINGS and not flags & http2.ACK:
                return

    def headers(self, stream: int, path: str = INFER, flags: int = 4, **more: str) -> bytes:
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "test"}
        fields |= {"te": "trailers", "content-type": "application/grpc"}
        fields |= {name.replace("_", "-"): value for name, value in more.items()}
        return http2.frame(http2.HEADERS, flags, stream, self._encoder.encode(list(fields.items())))

    def call(self, stream: int, message: bytes, compressed: int = 0, **more: str) -> bytes:
        return self.headers(stream, **more) + data_frames(
            stream, struct.pack(">BI", compressed, len(message)) + message
        )

    def frames(self) -> Iterator[tuple[int, int, int, Any]]:
        """(kind, flags, stream, payload or fields) as they come, until the server ends the connection."""
        while True:
            while len(self._data) < 9 or len(self._data) < 9 + int.from_bytes(self._data[:3], "big"):
                try:
                    more = self.socket.recv(1 << 16)
                except ConnectionError:
                    more = b""
                if not more:
                    self.closed = True
                    return
                self._data += more
            word, flags, stream = http2.HEAD_STRUCT.unpack_from(self._data)
            end = 9 + (word >> 8)
            payload: Any = self._data[9:end]
            self._data = self._data[end:]
            if word & 0xFF == http2.HEADERS:
                payload = {str(n): str(v) for n, v in self._decoder.decode(payload)}
            if word & 0xFF == http2.SETTINGS and not flags & http2.ACK:
                self.send(http2.frame(http2.SETTINGS, http2.ACK, 0))
            yield word & 0xFF, flags, stream, payload

    def status(self, stream: int) -> str:
        """The status that ends a call: gRPC's by number, "http NNN", "reset N", or "closed"."""
        for kind, _, number, payload in self.frames():
            if number == stream and kind == http2.HEADERS:
                if "grpc-status" in payload:
                    return str(payload["grpc-status"])
                if payload.get(":status", "200") != "200":
                    return f"http {payload[':status']}"
            elif number == stream and kind == http2.RST_STREAM:
                return f"reset {int.from_bytes(payload, 'big')}"
        return "closed"

    def close(self) -> None:
        self.socket.close()


def data_frames(stream: int, payload: bytes, end: bool = True) -> bytes:
    pieces = [payload[i : i + http2.DEFAULT_FRAME] for i in range(0, len(payload), http2.DEFAULT_FRAME)] or [b""]
    return b"".join(
        [http2.frame(http2.DATA, http2.END_STREAM if end and p is pieces[-1] else 0, stream, p) for p in pieces]
    )
