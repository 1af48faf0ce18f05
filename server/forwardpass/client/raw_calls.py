"""Unary calls with serialized messages, for callers that build them: load tests and their preliminary checks."""

from __future__ import annotations

from typing import Any, Self

import grpc

from forwardpass.client.credentials import PLAIN, Access
from forwardpass.client.errors import from_status


class RawChannel:
    """One channel to `address`; a context manager. Responses may have any size."""

    def __init__(self, address: str, access: Access = PLAIN) -> None:
        """Raises SettingsError for files that cannot be used."""
        self._address = address
        self._metadata = access.metadata(address)
        options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", -1)]
        if access.tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
            return
        if access.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", access.tls.server_name))
        self._channel = grpc.secure_channel(address, access.tls.credentials(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, path: str, message: bytes, timeout: float) -> bytes:
        """The response to `message` sent to the method at `path`. Raises CallError; `timeout` is in seconds."""
        try:
            response: bytes = self._channel.unary_unary(path)(message, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_status(
                error.code().value[0],
                error.details() or "",
                error.trailing_metadata() or (),
                address=self._address,
                timeout=timeout,
            ) from None
        return response
