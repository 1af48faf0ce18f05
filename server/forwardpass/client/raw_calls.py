"""Unary calls with serialized messages, for callers that build them: load tests and their preliminary checks."""

from __future__ import annotations

from typing import Self

import grpc

from forwardpass.client.errors import from_status


class RawChannel:
    """One plaintext channel to `address`; a context manager. Responses may have any size."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, path: str, message: bytes, timeout: float) -> bytes:
        """The response to `message` sent to the method at `path`. Raises CallError; `timeout` is in seconds."""
        try:
            response: bytes = self._channel.unary_unary(path)(message, timeout=timeout)
        except grpc.RpcError as error:
            raise from_status(
                error.code().value[0],
                error.details() or "",
                error.trailing_metadata() or (),
                address=self._address,
                timeout=timeout,
            ) from None
        return response
