"""An HTTP client for the tests: requests in JSON or with binary tensors by the standard library, and raw sockets."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The error's text. Every error of the port has one, on one line."""
        assert self.status >= 400 and self.json.keys() == {"error"}, self
        text: str = self.json["error"]
        assert text.isprintable(), text
        return text


class HttpCaller:
    """Calls one server over one connection, opened anew where the server closed it."""

    def __init__(self, url: str, secure: ssl.SSLContext | None = None, timeout: float = 60.0) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self.address = (parts.hostname, parts.port)
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            self._connection = http.client.HTTPSConnection(*self.address, context=secure, timeout=timeout)
        else:
            self._connection = http.client.HTTPConnection(*self.address, timeout=timeout)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request; `body` that is no bytes as JSON. Underscores in a header's name become hyphens."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, data, named)
        response = self._connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def infer(self, model: str, body: Any, **headers: str) -> Answer:
        return self.post(f"/v2/models/{model}/infer", body, **headers)

    def connect(self) -> socket.socket:
        """A connection for whatever bytes a test likes, with a time limit."""
        return socket.create_connection(self.address, 60.0)

    def close(self) -> None:
        self._connection.close()


def tensor(array: NDArray[Any], datatype: str = "FP32", name: str = "x") -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist()}


def binary(arrays: dict[str, NDArray[Any]], **more: Any) -> tuple[bytes, int]:
    """A body with float32 tensors as binary data, all outputs wanted so, and the length of its JSON header."""
    inputs = [
        {"name": n, "shape": list(a.shape), "datatype": "FP32", "parameters": {"binary_data_size": a.nbytes}}
        for n, a in arrays.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}} | more).encode()
    return b"".join((head, *(a.astype(np.float32).tobytes() for a in arrays.values()))), len(head)


def received(sock: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data
